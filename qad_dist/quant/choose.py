"""What a fold group's inputs may be divided by, and where a static scale may cut them off: the candidates. Pure.

Which of them is taken is decided for the whole decoder at once, by KL on the part of the calibration set that is held
out from them; so each is told twice, from the whole set and from what is left without that part.

Dimension key: C input channels.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qad_dist.config.quantize import QuantizeConfig
from qad_dist.formats import Format
from qad_dist.quant.search import Choice, Group, scale_at, search, search_kept_share

USUAL_ALPHA = 1.0
"""What a search has to beat: ModelOpt's own."""
FEW_BIT_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""With weights of few bits more than this always loses."""
PLAIN, MSE, PERCENTILE, USUAL = "plain", "mse", "percentile", "usual"
"""Names of candidates: not clipped, clipped either way, and :data:`USUAL_ALPHA` without clipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to treat a group."""

    choice: Choice
    """As it follows from the whole calibration set."""
    trial_C: Tensor
    """The scale as it follows from the rest alone."""
    trial_amax: float
    """Of a static input behind that scale, clipped as the choice says."""

    def on_host(self) -> "Candidate":
        """The same, for ranks to exchange."""
        return replace(self, choice=replace(self.choice, scale_C=self.choice.scale_C.cpu()), trial_C=self.trial_C.cpu())


def candidates(name: str, whole: Group, rest: Group, section: QuantizeConfig) -> dict[str, Candidate]:
    """All that the settings leave open for one group, by name; one at least, and the same names for all groups.

    Args:
        name: Of the group.
        whole: With the largest magnitudes over the whole set.
        rest: With those over what is left without the held-out part, on which choices are compared.
        section: The run's.
    """
    recipe, clip = section.recipe, section.clip if section.recipe.input_scales == "tensor" else "none"
    alpha = section.alpha.get(name, USUAL_ALPHA) if isinstance(section.alpha, dict) else section.alpha
    plain = _smoothed(alpha, whole, rest, section)
    found: dict[str, Choice] = {}
    if clip in ("none", "search"):
        found[PLAIN] = plain
    if clip in ("percentile", "search"):
        found[PERCENTILE] = replace(plain, kept_share=percentile_share(whole, plain.scale_C, section.clip_percentile))
    if clip in ("mse", "search"):
        rest_C = _scale(plain.alpha, rest, recipe)
        found[MSE] = replace(
            plain, kept_share=search_kept_share(rest, recipe, scale_C=rest_C, group_size=section.group_size)
        )
    if alpha == "search" and not recipe.is_corrected:
        found[USUAL] = Choice(alpha=USUAL_ALPHA, scale_C=scale_at(USUAL_ALPHA, whole, recipe))
    return {key: _candidate(choice, rest, recipe) for key, choice in found.items()}


def percentile_share(group: Group, scale_C: Tensor, percentile: float) -> float:
    """Share of the amax behind ``scale_C`` that so many percent of the sampled inputs do not exceed."""
    smoothed = (group.tokens.inputs_SC / scale_C).abs().flatten().cpu().numpy()
    return min(1.0, float(np.percentile(smoothed, percentile)) / float((group.amax_C / scale_C).amax()))


def _smoothed(alpha: float | str, whole: Group, rest: Group, section: QuantizeConfig) -> Choice:
    """Without clipping; alphas are compared on the rest, and the scale follows from the whole set."""
    recipe = section.recipe
    if alpha == "none":
        return Choice(alpha=None, scale_C=torch.ones_like(whole.amax_C))
    if alpha != "search":
        return Choice(alpha=float(alpha), scale_C=scale_at(float(alpha), whole, recipe))
    alphas = FEW_BIT_ALPHAS if recipe.is_corrected else None
    found = search(rest, recipe, alphas=alphas, kept_shares=[1.0], group_size=section.group_size)
    return replace(found, scale_C=_scale(found.alpha, whole, recipe))


def _candidate(choice: Choice, rest: Group, recipe: Format) -> Candidate:
    trial_C = _scale(choice.alpha, rest, recipe)
    amax = float((rest.amax_C / trial_C).amax()) * choice.kept_share
    return Candidate(choice=choice, trial_C=trial_C, trial_amax=amax)


def _scale(alpha: float | None, group: Group, recipe: Format) -> Tensor:
    return torch.ones_like(group.amax_C) if alpha is None else scale_at(alpha, group, recipe)
