"""Students folded for decoding answer to the last bit as their fake-quantized selves."""

import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import transcribe
from qad_dist.linears import LINEARS
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.folded import FoldedLinear, fold_for_decoding
from qad_dist.quant.state import enabled_quantizers, fold_from, fold_weights
from tests.helpers.quantized import NUM_LAYERS, copied, logits_of, quantize
from tests.helpers.qwen import mels_of

NUM_LINEARS = 7 * NUM_LAYERS


def kinds(model: AsrModel) -> set[str]:
    return {type(m).__name__ for name, m in model.decoder.layers.named_modules() if name.endswith(LINEARS)}


@pytest.mark.parametrize(
    ("number_format", "kind"),
    [
        ("int8", "FoldedLinear"),
        ("int8_dynamic", "FoldedLinear"),
        ("w4a8", "FoldedLinear"),
        ("int8_weight_only", "Linear"),
        ("int4_weight_only", "Linear"),
    ],
)
def test_logits_and_transcripts_are_those_of_fake_quantization(
    calibrated, unseen, clips, number_format: str, kind: str
) -> None:
    student = copied(calibrated(format=number_format).student)
    use_fast_fake_quant(student.model)
    folded = copied(student)

    assert fold_for_decoding(folded.decoder.layers) == NUM_LINEARS

    assert kinds(folded) == {kind}
    assert not list(enabled_quantizers(folded.model))
    assert torch.equal(logits_of(folded, unseen), logits_of(student, unseen))
    mels = mels_of(student, clips[18:22])
    found, expected = (transcribe(model, mels, max_response_tokens=40) for model in (folded, student))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.token_logprobs for one in found] == [one.token_logprobs for one in expected]


@pytest.mark.parametrize("number_format", ["int8", "int8_dynamic"])
def test_so_are_they_in_bfloat16_whose_scales_stay_float32(nano, batches, unseen, number_format: str) -> None:
    student = quantize(copied(nano), *batches, format=number_format, alpha=1.0, dtype=torch.bfloat16)
    student.model.to(torch.bfloat16)
    use_fast_fake_quant(student.model)
    folded = copied(student)

    fold_for_decoding(folded.decoder.layers)

    assert torch.equal(logits_of(folded, unseen), logits_of(student, unseen))
    down = folded.decoder.layers[0].mlp.down_proj
    assert down.weight.dtype == torch.bfloat16
    assert down.to(torch.float64).scale is None or down.scale.dtype == torch.float32


def test_what_is_no_format_of_integers_stays_modelopts(calibrated, unseen) -> None:
    student = copied(calibrated(format="fp8").student)
    folded = copied(student)

    assert fold_for_decoding(folded.decoder.layers) == 0

    assert torch.equal(logits_of(folded, unseen), logits_of(student, unseen))


def test_silent_inputs_and_a_silent_scale_become_zero() -> None:
    inputs = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    weight = torch.eye(2)

    per_token, silent = FoldedLinear(weight, None, None), FoldedLinear(weight, None, torch.tensor(0.0))

    assert per_token(inputs)[0].tolist() == [0.0, 0.0]
    assert per_token(inputs)[1].tolist() == pytest.approx([1.0, -2.0], abs=2 / 127)
    assert silent(inputs).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_bias_is_added_behind_the_product() -> None:
    linear = FoldedLinear(torch.eye(2), torch.tensor([3.0, 4.0]), torch.tensor(127.0))

    assert linear(torch.tensor([[1.2, 2.6]])).tolist() == [[4.0, 7.0]]


def test_memory_of_the_weights_is_shared_not_copied(new_student: AsrModel) -> None:
    weight = new_student.decoder.layers[1].mlp.up_proj.weight
    place = weight.data_ptr()

    fold_for_decoding(new_student.decoder.layers)

    assert new_student.decoder.layers[1].mlp.up_proj.weight.data_ptr() == place
    assert not any(parameter.requires_grad for parameter in new_student.decoder.layers.parameters())


def test_a_folded_copy_takes_the_weights_of_a_student_in_training(student: AsrModel, new_student, unseen) -> None:
    fold_for_decoding(new_student.decoder.layers)
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: weight + 0.01 * weight.std() * torch.randn(weight.shape, generator=generator)
        for name, weight in student.decoder.layers.named_parameters()
    }
    expected = copied(student)
    with torch.no_grad():
        for name, weight in expected.decoder.layers.named_parameters():
            weight.copy_(moved[name])
    fold_weights(expected.model)

    fold_from(new_student.decoder.layers, student.decoder.layers, moved)

    assert torch.equal(logits_of(new_student, unseen), logits_of(expected, unseen))


def test_nothing_else_is_replaced(new_student: AsrModel) -> None:
    others = [new_student.audio_tower, new_student.model.thinker.lm_head, new_student.decoder.norm]
    before = [type(module) for part in others for module in part.modules()]

    fold_for_decoding(new_student.decoder.layers)

    assert [type(module) for part in others for module in part.modules()] == before
    assert fold_for_decoding(new_student.decoder.layers) == 0
