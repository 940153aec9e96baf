"""Which quantizers take the fast path, what the log says of it, and that what is saved does not name it."""

import importlib.util
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend, unregister_quant_backend
from torch import Tensor, nn

from qad_dist.asr.load import AsrModel
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.quant import fake_quant as module
from qad_dist.quant.fake_quant import (
    BACKEND,
    FakeQuantPaths,
    use_fast_fake_quant,
    use_modelopt_fake_quant,
    without_backend,
)
from qad_dist.quant.state import enable_checkpointing, enabled_quantizers
from tests.helpers.operators import count_operators
from tests.helpers.quantized import NUM_QUANTIZERS, logits_of
from tests.helpers.quantizers import calibrated, new_quantizer, random_values


def test_log_says_in_one_line_that_all_quantizers_run_the_fast_path(
    new_student: AsrModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "qad_dist"):
        use_fast_fake_quant(new_student.model)

    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "event=fake_quant path=qad quantizers=42 modelopt=0")
    ]


def test_formats_that_stay_with_modelopt_are_counted_and_warned_of(
    new_student: AsrModel, caplog: pytest.LogCaptureFixture
) -> None:
    mlp = new_student.decoder.layers[1].mlp
    mlp.gate_proj.input_quantizer.num_bits = (4, 3)
    mlp.up_proj.input_quantizer.num_bits = (4, 3)
    mlp.down_proj.input_quantizer.unsigned = True

    with caplog.at_level(logging.INFO, "qad_dist"):
        found = use_fast_fake_quant(new_student.model)

    assert found == FakeQuantPaths(num_qad=NUM_QUANTIZERS - 3, num_modelopt=3)
    assert mlp.up_proj.input_quantizer.backend is None
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    info, warning = (record.message for record in caplog.records)
    assert info == "event=fake_quant path=qad+modelopt quantizers=42 modelopt=3"
    extension = "yes" if torch.cuda.is_available() else "no"
    assert warning == (
        "event=fake_quant_by_modelopt quantizers=3 first=thinker.model.layers.1.mlp.gate_proj.input_quantizer "
        f'why="num_bits (4, 3): 2, unsigned: 1" cuda_extension={extension}'
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"num_bits": 8, "fake_quant": False}, "packed weights: 1"),
        ({"num_bits": 8, "bias": {-1: None, "type": "dynamic"}}, "bias: 1"),
        ({"num_bits": 8, "backend": "someone_elses"}, "backend someone_elses: 1"),
        ({"num_bits": 8, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}, "dynamic blocks: 1"),
    ],
)
def test_what_our_formula_does_not_know_stays_with_modelopt(
    config: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    quantizer = new_quantizer(config)
    before = quantizer.backend

    assert use_fast_fake_quant(quantizer) == FakeQuantPaths(num_qad=0, num_modelopt=1)

    assert quantizer.backend == before
    assert f'why="{why}"' in caplog.text
    assert use_modelopt_fake_quant(quantizer) == 0
    assert quantizer.backend == before


def test_blocks_of_weights_are_fast_as_modelopt_leaves_them_unless_their_scales_are_learned() -> None:
    blocks = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}}
    model = nn.Sequential(nn.Linear(96, 64))
    mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}, blocks], "algorithm": "max"})
    inputs = random_values((5, 96), torch.float32)
    expected = model(inputs)

    assert use_fast_fake_quant(model) == FakeQuantPaths(num_qad=1, num_modelopt=0)
    assert torch.equal(model(inputs), expected)

    use_modelopt_fake_quant(model)
    model[0].weight_quantizer.enable_lsq(quantize_scales=False)
    assert use_fast_fake_quant(model) == FakeQuantPaths(num_qad=0, num_modelopt=1)


def test_subclass_that_computes_otherwise_stays_with_modelopt(caplog: pytest.LogCaptureFixture) -> None:
    class Doubling(TensorQuantizer):
        def _fake_quantize(self, inputs: Tensor) -> Tensor:
            return 2 * inputs

    assert use_fast_fake_quant(Doubling()) == FakeQuantPaths(num_qad=0, num_modelopt=1)
    assert 'why="Doubling: 1"' in caplog.text


def test_integer_member_of_a_chain_of_quantizers_is_fast_and_the_other_stays(caplog: pytest.LogCaptureFixture) -> None:
    weight = random_values((16, 96), torch.float32)
    blocks = calibrated({"num_bits": 4, "block_sizes": {-1: 32}}, weight)
    chain = SequentialQuantizer(blocks, calibrated({"num_bits": (4, 3)}, weight))
    expected = chain(weight)

    assert use_fast_fake_quant(chain) == FakeQuantPaths(num_qad=1, num_modelopt=1)

    assert (chain[0].backend, chain[1].backend) == (BACKEND, None)
    assert torch.equal(chain(weight), expected)
    assert 'first=1 why="num_bits (4, 3): 1"' in caplog.text


def test_disabled_quantizers_are_left_alone(new_student: AsrModel) -> None:
    use_fast_fake_quant(new_student.model)

    assert new_student.model.thinker.lm_head.input_quantizer.backend is None


def test_backend_is_registered_once_also_when_the_module_is_imported_again() -> None:
    spec = importlib.util.spec_from_file_location("imported_again", str(module.__file__))
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = again
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        spec.loader.exec_module(again)
        for use in (use_fast_fake_quant, again.use_fast_fake_quant, use_fast_fake_quant):
            use(new_quantizer({"num_bits": 8}))
    del sys.modules[spec.name]


def test_taking_it_back_restores_modelopts_own_path_and_no_one_elses(
    student: AsrModel, new_student: AsrModel, unseen: Batch
) -> None:
    register_quant_backend("someone_elses", lambda inputs, _: inputs)
    try:
        other = new_student.decoder.layers[0].mlp.up_proj.input_quantizer
        other.backend = "someone_elses"
        use_fast_fake_quant(new_student.model)
        # Once fast, it stays so while it is disabled.
        new_student.decoder.layers[1].mlp.up_proj.input_quantizer.disable()

        assert use_modelopt_fake_quant(new_student.model) == NUM_QUANTIZERS - 1

        new_student.decoder.layers[1].mlp.up_proj.input_quantizer.enable()
        assert [quantizer.backend for _, quantizer in enabled_quantizers(new_student.model) if quantizer.backend] == [
            "someone_elses"
        ]
    finally:
        unregister_quant_backend("someone_elses")
    other.backend = None
    with count_operators() as operators:
        assert torch.equal(logits_of(new_student, unseen), logits_of(student, unseen))
    assert operators["_local_scalar_dense"] >= 3 * NUM_QUANTIZERS


def test_backend_is_gone_inside_and_back_after_the_block_also_after_an_error(new_student: AsrModel) -> None:
    use_fast_fake_quant(new_student.model)
    inside = set()

    def save() -> None:
        with without_backend(new_student.model):
            inside.update(quantizer.backend for _, quantizer in enabled_quantizers(new_student.model))
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save()

    assert inside == {None}
    assert [quantizer.backend for _, quantizer in enabled_quantizers(new_student.model)] == [BACKEND] * NUM_QUANTIZERS


ELSEWHERE = """
import sys

import modelopt.torch.opt as mto
import qwen_asr
import torch
from transformers import AutoModel

mto.enable_huggingface_checkpointing()
saved_plainly, saved_without_backend, expected = sys.argv[1:]
inputs, output = torch.load(expected)
for folder in (saved_without_backend, saved_plainly):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    try:
        found = model.thinker.model.layers[0].mlp.up_proj(inputs)
        print("result: equal" if torch.equal(found, output) else "result: unequal")
    except KeyError as error:
        print("result:", error.args[0])
assert "qad_dist" not in sys.modules
"""


def test_folder_saved_without_the_backend_loads_where_this_project_is_unknown(
    new_student: AsrModel, tmp_path: Path
) -> None:
    """And saved with it, it does not: ModelOpt's state keeps the name."""
    enable_checkpointing()
    use_fast_fake_quant(new_student.model)
    plainly, without = tmp_path / "plainly", tmp_path / "without"
    save_checkpoint(new_student.model, plainly, base=new_student.folder, dtype="float32")
    with without_backend(new_student.model):
        save_checkpoint(new_student.model, without, base=new_student.folder, dtype="float32")
    inputs = torch.randn(1, 5, 128)
    torch.save((inputs, new_student.decoder.layers[0].mlp.up_proj(inputs).detach()), tmp_path / "expected.pt")

    arguments = [sys.executable, "-c", ELSEWHERE, str(plainly), str(without), str(tmp_path / "expected.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
    assert results == ["result: equal", f"result: Quant backend '{BACKEND}' is not registered."]
