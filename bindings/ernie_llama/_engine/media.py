"""What a prompt shows beside text: image files, video files, and frames that the program has. Bitmaps for libmtmd."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from ctypes import c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .._lib import mtmd
from .image_file import decoded

if TYPE_CHECKING:
    import numpy as np

MAX_FRAMES = 65536  # of which a model sees far fewer


@dataclass(frozen=True)
class ImageFile:
    """An image file in memory."""

    kind: ClassVar[str] = "image"
    data: bytes

    def __str__(self) -> str:
        return f"{len(self.data)} bytes"

    @property
    def digest(self) -> str:
        """Tells it from others."""
        return hashlib.sha256(self.data).hexdigest()

    def bitmap(self, library: ctypes.CDLL, context: c_void_p, stack: ExitStack) -> int:
        """An `mtmd_bitmap *`, which `stack` frees.

        Raises:
            ValueError: it is no image, or damaged; the message goes on after a name of the image.
        """
        return _freed(library, stack, library.mtmd_bitmap_init(*decoded(self.data)))


@dataclass(frozen=True)
class VideoFile:
    """A video file in memory, which ffmpeg reads."""

    kind: ClassVar[str] = "video"
    data: bytes

    def __str__(self) -> str:
        return f"{len(self.data)} bytes"

    @property
    def digest(self) -> str:
        """Tells it from others."""
        return hashlib.sha256(b"video" + self.data).hexdigest()

    def bitmap(self, library: ctypes.CDLL, context: c_void_p, stack: ExitStack) -> int:
        """An `mtmd_bitmap *`, whose frames are read while the prompt is tokenized; `stack` frees it.

        Raises:
            ValueError: it is no video, or damaged, or ffmpeg is missing; the message goes on after a name of the video.
        """
        options = library.mtmd_helper_init_opt_default()
        found = library.mtmd_helper_bitmap_init_from_buf(context, self.data, len(self.data), False, options)
        if not found.bitmap:
            reason = library.mtmd_helper_get_error().decode(errors="replace")
            raise ValueError(f"cannot be used: {reason or 'it is damaged or of an unsupported format'}")
        if found.video_ctx:
            stack.callback(library.mtmd_helper_video_free, found.video_ctx)
        bitmap = _freed(library, stack, found.bitmap)
        if not found.video_ctx:
            raise ValueError("is an image or a sound, expected a video")
        return bitmap


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a video, [height, width, 3] in RGB and of one size, `fps` of them in a second."""

    kind: ClassVar[str] = "video"
    width: int
    height: int
    frames: tuple[bytes, ...]
    fps: float

    @classmethod
    def of(cls, frames: Any, fps: Any) -> VideoFrames:  # noqa: ANN401 - whatever a program passes
        """Frames that are images of Pillow or arrays of uint8 [height, width, 3], or one array with all of them.

        Raises:
            ValueError: they are none of these, there are none, they differ in size, or `fps` is no number above 0.
        """
        import numpy as np  # slow to import, and only videos need it

        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise ValueError(f"a video of frames has the fps {fps!r}, expected how many there are in a second")
        if isinstance(frames, str | bytes) or not isinstance(frames, Sequence | np.ndarray):
            raise ValueError(f"a video is {type(frames).__name__}, expected a list of frames")
        if not 1 <= len(frames) <= MAX_FRAMES:
            raise ValueError(f"a video has {len(frames)} frames, expected 1 to {MAX_FRAMES}")
        arrays = [_pixels(number, frame) for number, frame in enumerate(frames)]
        height, width, _ = arrays[0].shape
        for number, array in enumerate(arrays):
            if array.shape != arrays[0].shape:
                found = f"{array.shape[1]}x{array.shape[0]}"
                raise ValueError(f"frame {number} of a video is {found} pixels, the first is {width}x{height}")
        return cls(width, height, tuple(array.tobytes() for array in arrays), float(fps))

    def __str__(self) -> str:
        return f"{len(self.frames)} frames"

    @property
    def digest(self) -> str:
        """Tells them from others."""
        found = hashlib.sha256(struct.pack("<qqqd", self.width, self.height, len(self.frames), self.fps))
        for frame in self.frames:
            found.update(frame)
        return found.hexdigest()

    def bitmap(self, library: ctypes.CDLL, context: c_void_p, stack: ExitStack) -> int:
        """An `mtmd_bitmap *` of the frames that the model wants to see, each with its time; `stack` frees it.

        Raises:
            ValueError: the mmproj has no rule for choosing frames; the message goes on after a name of the video.
        """
        numbers = (ctypes.c_int32 * len(self.frames))()
        count = library.mtmd_helper_video_frames(context, len(self.frames), self.fps, -1.0, numbers, len(numbers))
        if count < 0:
            raise ValueError("cannot be used: this mmproj does not say which frames of a video its model sees")
        chosen = numbers[:count]

        def give(index: int, _: c_void_p, bitmap: ctypes._Pointer[c_void_p], __: object) -> int:
            if index >= len(chosen):
                return mtmd.LAZY_END
            number = chosen[index]
            bitmap[0] = library.mtmd_bitmap_init(self.width, self.height, self.frames[number])
            library.mtmd_bitmap_set_time(bitmap[0], number / self.fps)
            return 0

        callback = mtmd.mtmd_bitmap_lazy_callback(give)
        stack.callback(lambda kept: None, callback)  # C calls it until the stack unwinds
        return _freed(library, stack, library.mtmd_bitmap_init_lazy(context, self.digest.encode(), None, callback))


Medium = ImageFile | VideoFile | VideoFrames


def _freed(library: ctypes.CDLL, stack: ExitStack, bitmap: int) -> int:
    stack.callback(library.mtmd_bitmap_free, bitmap)
    return bitmap


def _pixels(number: int, frame: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:  # noqa: ANN401
    """[height, width, 3] in RGB; ValueError if a frame is no image."""
    import numpy as np
    from PIL import Image  # slow to import, and only images need it

    array = np.asarray(frame.convert("RGB")) if isinstance(frame, Image.Image) else frame
    if not isinstance(array, np.ndarray):
        found = type(frame).__name__
    elif array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        found = f"an array of {array.dtype} {list(array.shape)}"
    else:
        return array
    raise ValueError(
        f"frame {number} of a video is {found}, expected an image of Pillow or an array of uint8 [height, width, 3]"
    )
