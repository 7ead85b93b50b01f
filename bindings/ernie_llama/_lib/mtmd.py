"""libmtmd, which makes embeddings of images and videos: its structs and functions, as far as the bindings need them."""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

from . import structs
from .library import library_path
from .library import load as load_llama
from .log import LOG

LIBRARY_NAME = {"darwin": "libmtmd.dylib", "win32": "mtmd.dll"}.get(sys.platform, "libmtmd.so")
MTMD_INPUT_CHUNK_TYPE_TEXT = 0
LAZY_END = -1  # what a lazy bitmap's callback returns after the last frame

# (index, user data, bitmap to set, text to set)
mtmd_bitmap_lazy_callback = ctypes.CFUNCTYPE(c_int, c_size_t, c_void_p, POINTER(c_void_p), c_void_p)


class mtmd_context_params(ctypes.Structure):  # noqa: N801 - mtmd.h's name
    """Options of `mtmd_init_from_file`."""

    _fields_ = [
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", structs.enum),
        ("warmup", c_bool),
        ("image_min_tokens", c_int),
        ("image_max_tokens", c_int),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
    ]


class mtmd_input_text(ctypes.Structure):  # noqa: N801 - mtmd.h's name
    """A prompt with a marker for each image."""

    _fields_ = [("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool)]


class mtmd_helper_video_init_params(ctypes.Structure):  # noqa: N801 - mtmd-helper.h's name
    """Options of a video file's reader."""

    _fields_ = [("fps_target", c_float), ("ffmpeg_bin_dir", c_char_p), ("timestamp_interval_ms", c_int64)]


class mtmd_helper_init_opt(ctypes.Structure):  # noqa: N801 - mtmd-helper.h's name
    """Options of `mtmd_helper_bitmap_init_from_buf`."""

    _fields_ = [("video_params", mtmd_helper_video_init_params)]


class mtmd_helper_bitmap_wrapper(ctypes.Structure):  # noqa: N801 - mtmd-helper.h's name
    """What a media file is: a bitmap, and the reader of its frames if it is a video."""

    _fields_ = [("bitmap", c_void_p), ("video_ctx", c_void_p)]


# name: (result, arguments)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (mtmd_context_params, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, structs.llama_model_p, mtmd_context_params]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_support_vision": (c_bool, [c_void_p]),
    "mtmd_helper_log_set": (None, [structs.ggml_log_callback, c_void_p]),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_char_p]),
    "mtmd_bitmap_free": (None, [c_void_p]),
    "mtmd_bitmap_init_lazy": (c_void_p, [c_void_p, c_char_p, c_void_p, mtmd_bitmap_lazy_callback]),
    "mtmd_bitmap_set_time": (None, [c_void_p, c_double]),
    "mtmd_helper_init_opt_default": (mtmd_helper_init_opt, []),
    "mtmd_helper_bitmap_init_from_buf": (
        mtmd_helper_bitmap_wrapper,
        [c_void_p, c_char_p, c_size_t, c_bool, mtmd_helper_init_opt],
    ),
    "mtmd_helper_get_error": (c_char_p, []),
    "mtmd_helper_video_free": (None, [c_void_p]),
    "mtmd_helper_video_frames": (c_int32, [c_void_p, c_int64, c_double, c_float, POINTER(c_int32), c_size_t]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunks_free": (None, [c_void_p]),
    "mtmd_input_chunk_get_type": (structs.enum, [c_void_p]),
    "mtmd_input_chunk_get_tokens_text": (POINTER(structs.llama_token), [c_void_p, POINTER(c_size_t)]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_input_chunk_get_n_pos": (structs.llama_pos, [c_void_p]),
    "mtmd_input_chunk_copy": (c_void_p, [c_void_p]),
    "mtmd_input_chunk_free": (None, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(mtmd_input_text), POINTER(c_void_p), c_size_t]),
    "mtmd_tokenize_get_error": (c_char_p, []),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
    "mtmd_helper_decode_image_chunk": (
        c_int32,
        [
            c_void_p,
            structs.llama_context_p,
            c_void_p,
            POINTER(c_float),
            structs.llama_pos,
            structs.llama_seq_id,
            c_int32,
            POINTER(structs.llama_pos),
            c_void_p,
            c_void_p,
        ],
    ),
}


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Load libmtmd from the folder of libllama and declare `FUNCTIONS`.

    Raises:
        OSError: libmtmd is missing, or belongs to another version of llama.cpp.
    """
    load_llama()
    path = library_path().with_name(LIBRARY_NAME)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise OSError(f"{path} cannot be loaded, images need it: {error}; build it with `make build`") from error
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OSError(f"{path} lacks {name}: build the version of these bindings with `make build`") from None
        function.restype, function.argtypes = result, arguments
    library.mtmd_helper_log_set(LOG.callback, None)
    return library
