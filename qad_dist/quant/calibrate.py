"""Quantize a decoder: smooth, fold and round layer by layer in float32, then measure the scales in the dtype of use.

Everything that is chosen is chosen from maxima and sampled tokens that are equal on all ranks (:mod:`.walk`), so every
rank arrives at the same quantizers, whatever their number.

Dimension key: C input channels, O outputs, B blocks of an output's weights, N packed tokens, D width.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from qad_dist.config.quantize import QuantizeConfig
from qad_dist.quant.choose import Candidate, candidates
from qad_dist.quant.correct import correct_weight
from qad_dist.quant.fold import FoldGroup, fold_groups
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.search import Choice, Group, quantize_inputs, weight_amax
from qad_dist.quant.state import enabled_quantizers, switch_quantizers
from qad_dist.quant.walk import Maxima, Tokens, Walk, WalkBatch
from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.logs import prints_as_debug
from qad_dist.runtime.world import World
from shards.errors import ConfigError, ModelError

log = logging.getLogger(__name__)

GroupKey = tuple[int, str]
"""Number of a layer and name of a fold group."""


@dataclass(frozen=True, slots=True)
class SmoothedGroup:
    """What was chosen for a fold group, and what it was chosen from."""

    choice: Choice
    amax_C: Tensor
    """Largest magnitudes of its input channels before smoothing, on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where calibration data comes from and how its outcome is judged, told by whoever knows the model."""

    batches: Sequence[WalkBatch]
    """This rank's, in float32."""
    kl: Callable[[WalkBatch, Tensor, Tensor], tuple[float, int]]
    """From a batch and two ``[N, D]`` behind the last layer, the student's and the teacher's: KL in nats, summed over
    response tokens, and their number."""
    run_all: Callable[[], None]
    """Runs this rank's share of the whole calibration set through the decoder, in the model's present dtype."""
    world: World


class Calibration:
    """One quantization of one model, in place."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, section: QuantizeConfig, source: Source) -> None:
        """Insert the quantizers.

        Args:
            model: The whole float32 model.
            layers: Its decoder layers.
            section: The run's.
            source: Calibration data.

        Raises:
            ConfigError: ``quantize.group_size`` does not divide an input's width.
        """
        self._model, self._layers, self._section, self._source = model, layers, section, source
        self._recipe = section.recipe
        self.groups: dict[GroupKey, FoldGroup] = {
            (number, group.name): group for number, layer in enumerate(layers) for group in fold_groups(layer)
        }
        """All fold groups, layer by layer."""
        self.exact: dict[str, Tensor] = {}
        """Weights that were rounded, as they were before, by names as ``layers.3.mlp.down_proj``; on the host, in the
        dtype of use. Empty where quantizers alone round."""
        self._candidates: dict[GroupKey, dict[str, Candidate]] = {}
        if self._recipe.weight_scales == "group":
            self._check_group_size()
        with prints_as_debug(log):
            mtq.quantize(model, modelopt_config(self._recipe, group_size=section.group_size))
        switch_quantizers(model, on=False)

    def run(self, dtype: torch.dtype) -> dict[GroupKey, SmoothedGroup]:
        """Smooth, fold and round; then cast the model to ``dtype`` and measure the scales in it.

        Returns:
            What was chosen for each group.

        Raises:
            ModelError: An input was never seen in ``dtype``.
        """
        walk = Walk(self._source.batches, num_rows=self._section.search_rows, is_corrected=self._recipe.is_corrected)
        amax: dict[GroupKey, Tensor] = {}
        clipped: dict[str, Tensor] = {}
        for number, layer in enumerate(self._layers):
            amax |= self._smooth_layer(number, layer, walk, clipped, dtype)
        chosen = self._confirm(walk)
        walk.to_start()
        self._finish(dtype, chosen, clipped)
        return {key: SmoothedGroup(choice, amax[key]) for key, choice in chosen.items()}

    def _smooth_layer(
        self, number: int, layer: nn.Module, walk: Walk, clipped: dict[str, Tensor], dtype: torch.dtype
    ) -> dict[GroupKey, Tensor]:
        """Find the candidates of a layer's groups and fold the first; of few bits, put its weights on their grid, too.

        Returns:
            ``amax_C`` of each group, before smoothing, on the host.
        """
        groups = {key: group for key, group in self.groups.items() if key[0] == number}
        maxima, tokens = walk.pass_layer(layer, list(groups.values()))
        found = self._candidates_of(groups, maxima, tokens)
        self._candidates |= found
        for key, group in groups.items():
            group.fold(self._first_scale(key).to(walk.device))
        if self._recipe.is_corrected:
            for key, group in groups.items():
                for name, linear in group.consumers.items():
                    self.exact[f"layers.{number}.{name}"] = linear.weight.detach().to("cpu", dtype, copy=True)
                self._correct(key, group, tokens[group.name], layer, walk, clipped)
            walk.pass_drifted(layer)
            switch_quantizers(layer, on=False)
        log.info("event=smoothed layer=%d %s", number, " ".join(_told(name, found[number, name]) for _, name in groups))
        return {key: maxima[group.name].of_all_C.cpu() for key, group in groups.items()}

    def _candidates_of(
        self,
        groups: Mapping[GroupKey, FoldGroup],
        maxima: Mapping[str, Maxima],
        tokens: Mapping[str, Mapping[bool, Tokens]],
    ) -> dict[GroupKey, dict[str, Candidate]]:
        """Each rank searches for some of the groups, and all get what was found."""
        world = self._source.world
        own = {}
        for key, group in list(groups.items())[world.rank :: world.world_size]:
            weights = {name: linear.weight.detach() for name, linear in group.consumers.items()}
            weight_amax_C = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
            whole = Group(
                weights_OC=weights,
                amax_C=group.share(maxima[group.name].of_all_C),
                weight_amax_C=group.share(weight_amax_C),
                tokens=tokens[group.name][True],
            )
            rest = replace(whole, amax_C=group.share(maxima[group.name].of_rest_C))
            found = candidates(group.name, whole, rest, self._section)
            own[key] = {name: candidate.on_host() for name, candidate in found.items()}
        everywhere = {key: found for share in all_gather_objects(own) for key, found in share.items()}
        return {key: everywhere[key] for key in groups}  # in their order, whoever searched

    def _first_scale(self, key: GroupKey) -> Tensor:
        """What is folded at first: if there is a choice to make, as it would be without the part that it is made on."""
        first = next(iter(self._candidates[key].values()))
        return first.choice.scale_C if len(self._candidates[key]) == 1 else first.trial_C

    def _correct(
        self,
        key: GroupKey,
        group: FoldGroup,
        tokens: Mapping[bool, Tokens],
        layer: nn.Module,
        walk: Walk,
        clipped: dict[str, Tensor],
    ) -> None:
        """Put a group's weights on their grid, corrected for what is quantized before them, and switch them on."""
        part = False not in tokens  # of a single batch, which is of the search part, that
        drifted = walk.look_at_drifted(layer, group)[part]
        quantized_SC = quantize_inputs(drifted.inputs_SC, self._recipe, amax=drifted.inputs_SC.abs().amax())
        exact_SC = tokens[part].inputs_SC / self._first_scale(key).to(walk.device)
        for name, linear in group.consumers.items():
            rounded_OC, amax_OB1 = correct_weight(
                linear.weight.detach(),
                exact_SC,
                quantized_SC,
                drifted.weights_S,
                self._recipe,
                group_size=self._section.group_size,
            )
            linear.weight.data.copy_(rounded_OC)
            clipped[f"{key[0]}.{name}"] = amax_OB1.cpu()
            self._set_amax(linear.weight_quantizer, amax_OB1)
            switch_quantizers(linear, on=True)

    def _set_weight_amax(self, key: GroupKey, group: FoldGroup, clipped: Mapping[str, Tensor]) -> None:
        """Of the weights as they are now, or as their blocks were clipped."""
        for name, linear in group.consumers.items():
            amax_OB1 = clipped.get(f"{key[0]}.{name}")
            if amax_OB1 is None:
                amax_OB1 = weight_amax(linear.weight.detach(), self._recipe, group_size=self._section.group_size)
            self._set_amax(linear.weight_quantizer, amax_OB1.to(linear.weight))

    def _set_input_amax(self, group: FoldGroup, candidate: Candidate) -> None:
        """Of a static input on trial."""
        if self._recipe.input_scales == "tensor":
            for linear in group.consumers.values():
                self._set_amax(linear.input_quantizer, torch.tensor(candidate.trial_amax).to(linear.weight))

    def _set_amax(self, quantizer: TensorQuantizer, amax: Tensor) -> None:
        if self._recipe.weight_scales == "group" and amax.ndim == 3:
            amax = amax.flatten()[:, None]  # ModelOpt sees a row for each block
        elif self._recipe.weight_scales == "channel" and amax.ndim == 3:
            amax = amax.squeeze(2)
        elif amax.ndim == 3:
            amax = amax.amax()
        if hasattr(quantizer, "_amax"):
            quantizer.reset_amax()
        quantizer.amax = amax

    def _confirm(self, walk: Walk) -> dict[GroupKey, Choice]:
        """Of the candidates the one that is nearest to the teacher by KL on the part that is held out, and fold it.

        All are tried as they would be without that part. Weights that are corrected cannot be smoothed anew: there the
        settings leave one candidate.
        """
        names = list(next(iter(self._candidates.values())))
        best = names[0]
        if len(names) > 1:
            teacher = [batch.hidden_ND for batch in walk.batches if batch.is_search]
            folded = {key: self._first_scale(key) for key in self.groups}
            kls: dict[str, float] = {}
            switch_quantizers(self._model, on=True)
            for name in names:
                folded = self._refold(folded, {key: found[name].trial_C for key, found in self._candidates.items()})
                for key, group in self.groups.items():
                    self._set_weight_amax(key, group, {})
                    self._set_input_amax(group, self._candidates[key][name])
                kls[name] = self._kl(walk, teacher)
            best = min(kls, key=lambda name: kls[name])
            told = " ".join(f"kl_{name}={kl:.6g}" for name, kl in kls.items())
            log.info("event=confirmed chosen=%s %s", best, told)
            self._refold(folded, {key: found[best].choice.scale_C for key, found in self._candidates.items()})
        return {key: found[best].choice for key, found in self._candidates.items()}

    def _refold(self, present: Mapping[GroupKey, Tensor], wanted: dict[GroupKey, Tensor]) -> dict[GroupKey, Tensor]:
        """Replace the folded scales; returns the new ones."""
        for key, group in self.groups.items():
            group.fold((wanted[key] / present[key]).to(group.device))
        return wanted

    def _kl(self, walk: Walk, teacher: Sequence[Tensor]) -> float:
        """Per response token of the search part, added up in the order of the plan."""
        found = walk.final_states(self._layers)
        own = {
            batch.number: self._source.kl(batch, student_ND, teacher_ND)
            for (batch, student_ND), teacher_ND in zip(found, teacher, strict=True)
        }
        sums = {number: entry for share in all_gather_objects(own) for number, entry in share.items()}
        ordered = [sums[number] for number in sorted(sums)]
        return sum(kl for kl, _ in ordered) / max(1, sum(tokens for _, tokens in ordered))

    def _finish(self, dtype: torch.dtype, chosen: Mapping[GroupKey, Choice], clipped: Mapping[str, Tensor]) -> None:
        """Cast, and measure all scales as they will be used."""
        if dtype != torch.float32:
            cast_parameters(self._model, dtype)
        if self._recipe.input_scales == "tensor":
            for _, quantizer in enabled_quantizers(self._model):
                quantizer.reset_amax()
            mtq.calibrate(self._model, algorithm="max", forward_loop=lambda _: self._source.run_all())
            for key, group in self.groups.items():
                for name, linear in group.consumers.items():
                    if linear.input_quantizer.amax is None:
                        raise ModelError(
                            f"layers.{key[0]}.{name}.input_quantizer must see calibration data, got none; "
                            "the calibration batches must pass through every decoder layer"
                        )
                    linear.input_quantizer._amax.mul_(chosen[key].kept_share)
        for key, group in self.groups.items():
            self._set_weight_amax(key, group, clipped)
        switch_quantizers(self._model, on=True)

    def _check_group_size(self) -> None:
        for (_, name), group in self.groups.items():
            if group.num_channels % self._section.group_size:
                raise ConfigError(
                    f"quantize.group_size must divide the width of every input, got {self._section.group_size} for "
                    f"{group.num_channels} channels of {name}; take a divisor of both"
                )


def _told(name: str, found: Mapping[str, Candidate]) -> str:
    first = next(iter(found.values())).choice
    shares = [candidate.choice.kept_share for candidate in found.values()]
    alpha = "none" if first.alpha is None else f"{first.alpha:g}"
    return f"{name}={alpha}" + (f"/{min(shares):.3g}" if min(shares) != 1 else "")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """One by one, as a checkpoint of that dtype loads.

    ``model.to`` would round the rotary frequencies too, which stay float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
