"""Quantization of the decoder: recipe, calibration, folding, state. Nothing else imports modelopt."""
