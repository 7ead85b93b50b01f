"""The values of --outtype, apart from what they mean (see `plan`), so that the command line starts quickly."""

from enum import Enum


class Outtype(str, Enum):
    """The values of --outtype."""

    AUTO = "auto"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    CCQ2 = "ccq2"


class FloatType(str, Enum):
    """The types that embedding and head may be given apart from the rest."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"


class ExpertType(str, Enum):
    """The types that the vision experts may be given apart from the rest."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    CCQ2 = "ccq2"


class VisionTokens(str, Enum):
    """Which tokens of a text go through the vision experts, besides the images themselves."""

    ALL = "all"  # every id from the image placeholder on, as in Baidu's engine
    MARKS = "marks"  # those around an image or a video, as in transformers
