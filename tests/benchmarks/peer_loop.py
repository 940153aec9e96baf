"""The training step that this project is set beside: the same distillation as other programs write it.

Teacher and student are whole models, run by transformers through ``input_features``: each encodes the audio itself,
clip by clip, sees a padded batch, and computes logits of all positions. The student's fake quantization is ModelOpt's
as it is loaded, and the loss is ModelOpt's ``KDTrainer._standard_kd_loss`` itself. Where programs differ, the cheaper
way is taken: log-mels are made beforehand, only the decoder's Linear weights get gradients, no activation is computed
twice, and there is no key-value cache. Padding stands on the right.

Dimension key: B utterances, T text positions of the longest, M mel bins, F frames of the longest.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from modelopt.torch.distill.losses import LogitsDistillationLoss
from modelopt.torch.distill.plugins.huggingface import KDTrainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qad_dist.batch import Batch

IGNORED = -100


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A batch as a processor with padding returns it, and the labels that a collator adds."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    input_features_BMF: Tensor
    feature_attention_mask_BF: Tensor
    labels_BT: Tensor
    """int64: response tokens where they stand, ignored elsewhere."""

    @classmethod
    def from_packed(cls, batch: Batch, *, padding_id: int, dtype: torch.dtype) -> "PaddedBatch":
        """The same utterances side by side."""
        ids = batch.input_ids_N.split(batch.cu_seqlens_U1.diff().tolist())
        labels_N = torch.full_like(batch.input_ids_N, IGNORED)
        labels_N[batch.rows_R + 1] = batch.targets_R
        labels = labels_N.split([len(ids_T) for ids_T in ids])
        mels = [mel_MF.T for mel_MF in batch.mel_MF.split(batch.mel_lengths_U.tolist(), dim=1)]
        return cls(
            input_ids_BT=pad_sequence(ids, batch_first=True, padding_value=padding_id),
            attention_mask_BT=pad_sequence([torch.ones_like(ids_T) for ids_T in ids], batch_first=True),
            input_features_BMF=pad_sequence(mels, batch_first=True).transpose(1, 2).to(dtype),
            feature_attention_mask_BF=pad_sequence(
                [torch.ones(len(mel_FM), dtype=torch.int64, device=mel_FM.device) for mel_FM in mels], batch_first=True
            ),
            labels_BT=pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        )

    @property
    def num_positions(self) -> int:
        """Padding included."""
        return self.input_ids_BT.numel()


class PeerLoop:
    """Two models of transformers and ModelOpt's criterion."""

    def __init__(self, teacher: Any, student: Any) -> None:
        """Take the models, whole; the student's parameters that require gradients get them."""
        self._teacher, self._student = teacher.thinker, student.thinker
        self._criterion = LogitsDistillationLoss(temperature=1.0, reduction="none")

    def backward(self, batch: PaddedBatch) -> Tensor:
        """Mean KL over the response tokens of the batch; its gradient is in the student afterwards."""
        student_outputs = self._forward(self._student, batch)
        with torch.no_grad():
            teacher_outputs = self._forward(self._teacher, batch)
        trainer = SimpleNamespace(_kd_criterion=self._criterion, _last_teacher_outputs=teacher_outputs)
        del teacher_outputs  # as in ModelOpt: the trainer alone holds them, and lets go of them
        loss = KDTrainer._standard_kd_loss(trainer, student_outputs, batch.labels_BT)
        loss.backward()
        return loss.detach()

    @staticmethod
    def _forward(thinker: Any, batch: PaddedBatch) -> Any:
        return thinker(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            input_features=batch.input_features_BMF,
            feature_attention_mask=batch.feature_attention_mask_BF,
            use_cache=False,
        )
