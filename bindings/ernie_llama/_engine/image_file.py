"""Image files as pixels, as transformers' image loader has them: upright, in RGB, of an animation the first frame."""

from __future__ import annotations

import io

# Those of Pillow that people send. None of them runs another program, as Pillow does for EPS.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA")


def decoded(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels, [height, width, 3] in RGB, of an image file.

    transformers.image_utils.load_image does the same: the orientation in the file's EXIF data is applied, and
    transparency is dropped.

    Raises:
        ValueError: it is no image, or damaged; the message goes on after a name of the image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # slow to import, and only images need it

    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[each for each in FORMATS if each in Image.OPEN]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("is not a JPEG, PNG, GIF, WebP, BMP or TIFF file") from None
    except Exception as error:  # decoders raise what their formats make them
        raise ValueError(f"is damaged, or too large: {error}") from error
    return image.width, image.height, image.tobytes()
