"""The calibrated 2-bit quantizer (docs/quantizer.md). Needs the extra `quantize`: torch and matplotlib."""
