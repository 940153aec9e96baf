"""A program: a decoder layer with ModelOpt's quantizers, by ModelOpt's code and by this project's behind its hook.

    python -m tests.benchmarks.fake_quant [--rounds 5]

One layer of the real model's dimensions with random weights in bfloat16, quantized as the stage does it (INT8 weights
per channel, inputs per tensor, smoothed and folded), on one packed row of 512 tokens of four utterances. One thread,
one process; what is counted is processor time.

First the outputs and gradients are compared, and waits for the device, operators, graphs and breaks are counted. Then
all take turns. The tables have the smallest and the median milliseconds, and how many times these go into ModelOpt's.
The compiled layer is to be at least 2.3 times as fast as ModelOpt's forward, and 1.5 times with backward.
"""

import argparse
import copy
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from qad_dist.asr.attention import Segments
from qad_dist.asr.load import AsrModel
from qad_dist.config.quantize import QuantizeConfig
from qad_dist.quant.calibrate import Calibration, Source
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.state import enabled_quantizers
from qad_dist.quant.walk import WalkBatch
from qad_dist.runtime.world import current_world
from tests.benchmarks.label import DECODER
from tests.benchmarks.read import MALLOC
from tests.helpers.operators import WAITING, count_operators
from tests.helpers.qwen import load, write_random_model

LENGTHS = (96, 112, 144, 160)
VOCABULARY = 1024
"""Of the embedded teacher's tokenizer: embeddings and head are no part of what is timed."""
PLAIN, PLAIN_COMPILED = "bfloat16, no quantizers", "bfloat16, no quantizers, compiled"
MODELOPT, OURS, OURS_COMPILED = "ModelOpt", "this project", "this project, compiled"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the layer is called with, and the gradient of what it returns."""

    hidden_1ND: Tensor
    cos_1NE: Tensor
    sin_1NE: Tensor
    segments: Segments
    gradient_1ND: Tensor


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        program = [sys.executable, "-m", "tests.benchmarks.fake_quant", *sys.argv[1:]]
        os.execve(sys.executable, program, os.environ | MALLOC)
    warnings.filterwarnings("ignore", message=".*is not calibrated, skip smoothing")  # the audio tower, on purpose
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sizes = DECODER | {"num_hidden_layers": 1, "vocab_size": VOCABULARY}
        model = load(write_random_model(Path(folder) / "model", **sizes))
    inputs = random_inputs(model)
    layers, counters = variants(model, inputs)
    compare(layers, inputs)
    for name in (PLAIN, MODELOPT, OURS):
        with count_operators() as operators:
            run_with_backward(layers[name], inputs)
        waits = sum(operators[waiting] for waiting in WAITING)
        say(f"{name}: {waits} waits for the device, {sum(operators.values())} operators")
    for name, counter in counters.items():  # with fullgraph: no breaks, and so no waits
        say(f"{name}: graphs={counter.frame_count}")
    explained = torch._dynamo.explain(lambda: run(copy.deepcopy(layers[MODELOPT]), inputs))()
    say(f"{MODELOPT}, if compiled: graphs={explained.graph_count} breaks={explained.graph_break_count}")
    measure(layers, inputs, rounds=options.rounds)


def random_inputs(model: AsrModel) -> Inputs:
    num_tokens, width = sum(LENGTHS), model.decoder.norm.weight.shape[0]
    hidden_1ND = torch.randn(1, num_tokens, width)
    positions_1N = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    cos_1NE, sin_1NE = model.decoder.rotary_emb(hidden_1ND, positions_1N)
    segments = Segments.from_lengths(torch.tensor(LENGTHS), causal=True, device=torch.device("cpu"))
    hidden_1ND, cos_1NE, sin_1NE, gradient_1ND = (
        tensor.to(torch.bfloat16) for tensor in (hidden_1ND, cos_1NE, sin_1NE, torch.randn_like(hidden_1ND))
    )
    return Inputs(hidden_1ND, cos_1NE, sin_1NE, segments, gradient_1ND)


def variants(model: AsrModel, inputs: Inputs) -> tuple[dict[str, Any], dict[str, CompileCounterWithBackend]]:
    """The layers, with equal weights, and the counters of those that are compiled."""
    plain = copy.deepcopy(model.decoder.layers[0]).to(torch.bfloat16)

    @torch.no_grad()
    def run_all() -> None:
        dtype = next(model.decoder.layers.parameters()).dtype
        run(model.decoder.layers[0], inputs, dtype=dtype)

    hidden_ND = inputs.hidden_1ND.squeeze(0).float()
    batch = WalkBatch(
        number=0,
        is_search=True,
        start_ND=hidden_ND,
        rows_R=torch.arange(len(hidden_ND)),
        run_layer=lambda layer, _: run(layer, inputs, dtype=torch.float32).squeeze(0),
        hidden_ND=hidden_ND,
        drifted_ND=hidden_ND,
    )
    source = Source(batches=[batch], kl=lambda *_: (0.0, 0), run_all=run_all, world=current_world())
    section = QuantizeConfig(alpha=1.0, clip="none")
    Calibration(model.model, model.decoder.layers, section, source).run(torch.bfloat16)
    quantized = model.decoder.layers[0]
    fast = copy.deepcopy(quantized)
    paths = use_fast_fake_quant(fast)
    assert (paths.num_qad, paths.num_modelopt) == (14, 0)
    assert not any(quantizer.backend for _, quantizer in enabled_quantizers(quantized))
    layers = {
        PLAIN: plain,
        PLAIN_COMPILED: copy.deepcopy(plain),
        MODELOPT: quantized,
        OURS: fast,
        OURS_COMPILED: copy.deepcopy(fast),
    }
    counters = {name: CompileCounterWithBackend("inductor") for name in (PLAIN_COMPILED, OURS_COMPILED)}
    for name, layer in layers.items():
        layer.requires_grad_(True)
        if name in counters:
            layer.compile(backend=counters[name], fullgraph=True)
    return layers, counters


def run(layer: Any, inputs: Inputs, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return layer(
        inputs.hidden_1ND.to(dtype),
        position_embeddings=(inputs.cos_1NE.to(dtype), inputs.sin_1NE.to(dtype)),
        attention_mask=None,
        segments=inputs.segments,
    )


def run_with_backward(layer: Any, inputs: Inputs) -> Tensor:
    """As in a step: gradients of the weights and of the input, which go to the layer below."""
    layer.zero_grad()
    inputs.hidden_1ND.requires_grad_(True).grad = None
    output = run(layer, inputs)
    output.backward(inputs.gradient_1ND)
    inputs.hidden_1ND.requires_grad_(False)
    return output


def compare(layers: dict[str, Any], inputs: Inputs) -> None:
    """This project's eager layer must be ModelOpt's to the last bit; the compiled one rounds less often in between."""
    results = {name: gradients_and_output(layer, inputs) for name, layer in layers.items()}
    expected = results[MODELOPT]
    assert all(torch.equal(results[OURS][name], expected[name]) for name in expected), "eager must be ModelOpt's bits"
    say("this project equals ModelOpt to the last bit: output and all gradients")
    for name, reference in ((OURS_COMPILED, MODELOPT), (PLAIN_COMPILED, PLAIN)):
        worst = min(cosine(results[name][part], results[reference][part]) for part in results[reference])
        output = results[name]["output"].float() - results[reference]["output"].float()
        share = float(output.norm() / results[reference]["output"].float().norm())
        say(f"{name}: output off by {share:.1e} of its norm from {reference}, least cosine of a gradient {worst:.6f}")
        assert worst > 0.999, f"gradients must agree, got a cosine of {worst}"


def gradients_and_output(layer: Any, inputs: Inputs) -> dict[str, Tensor]:
    found = {"output": run_with_backward(layer, inputs).detach(), "input": inputs.hidden_1ND.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def measure(layers: dict[str, Any], inputs: Inputs, *, rounds: int) -> None:
    works: dict[str, Callable[[Any, Inputs], Any]] = {"forward": run, "forward and backward": run_with_backward}
    taken: dict[tuple[str, str], list[float]] = {(work, name): [] for work in works for name in layers}
    for _ in range(rounds):
        for work, call in works.items():
            for name, layer in layers.items():
                begun = time.process_time()
                call(layer, inputs)
                taken[work, name].append((time.process_time() - begun) * 1e3)
    for work in works:
        say(f"\n| {work} | smallest, ms | median, ms | ModelOpt's smallest / its | ModelOpt's median / its |")
        say("|---|---|---|---|---|")
        least, median = ({name: float(choose(taken[work, name])) for name in layers} for choose in (np.min, np.median))
        for name in layers:
            ratios = f"{least[MODELOPT] / least[name]:.2f} | {median[MODELOPT] / median[name]:.2f}"
            say(f"| {name} | {least[name]:.1f} | {median[name]:.1f} | {ratios} |")
    say(f"\n{rounds} rounds in turn, {sum(LENGTHS)} tokens, one thread, load average {os.getloadavg()[0]:.1f}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
