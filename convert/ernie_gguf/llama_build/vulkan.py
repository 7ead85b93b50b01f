"""What a build with Vulkan needs, and what its shader compiler lacks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FEATURE_TESTS = Path("ggml", "src", "ggml-vulkan", "vulkan-shaders", "feature-tests")
# Upstream's test shader of a feature that ggml-vulkan can do without: what it is for.
FEATURES = {
    "integer_dot": "integer dot products, which single tokens and prompts use",
    "coopmat": "the matrix cores of all GPUs (KHR_cooperative_matrix), for prompts",
    "coopmat2": "those of NVIDIA's (NV_cooperative_matrix2)",
}


def missing_headers(compiler: str) -> list[str]:
    """Which of Vulkan's headers and its loader this compiler does not find, by their names in `tools.PACKAGES`."""
    needs = {
        "vulkan.hpp": ["-fsyntax-only", "-include", "vulkan/vulkan.hpp"],
        "spirv.hpp": ["-fsyntax-only", "-include", "spirv/unified1/spirv.hpp"],
        "libvulkan": ["-shared", "-o", os.devnull, "-Wl,--no-as-needed", "-lvulkan"],
    }
    sdk = os.environ.get("VULKAN_SDK")
    folders = [f"-I{sdk}/include", f"-L{sdk}/lib"] if sdk else []

    def fails(arguments: list[str]) -> bool:
        command = [compiler, "-std=c++17", *folders, "-x", "c++", os.devnull, *arguments]
        return subprocess.run(command, capture_output=True, check=False).returncode != 0

    return [name for name, arguments in needs.items() if fails(arguments)]


def missing_features(glslc: str, tree: Path) -> list[str]:
    """The keys of `FEATURES` that this glslc cannot compile; ggml-vulkan's CMakeLists.txt asks it the same."""

    def lacks(feature: str) -> bool:
        shader = tree / FEATURE_TESTS / f"{feature}.comp"
        command = [glslc, "-o", "-", "-fshader-stage=compute", "--target-env=vulkan1.3", str(shader)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        return "extension not supported" in done.stderr

    return [feature for feature in FEATURES if lacks(feature)]


def notes(glslc: str, tree: Path) -> list[str]:
    """What to tell the user about features that the build will lack; empty if it lacks none."""
    missing = missing_features(glslc, tree)
    if not missing:
        return []
    told = subprocess.run([glslc, "--version"], capture_output=True, text=True, check=False).stdout
    version, _, _ = told.partition("\n")
    return [
        f"{glslc} ({version}) is too old for {'; for '.join(FEATURES[feature] for feature in missing)}. The build will "
        "run, but slower; the glslc of shaderc 2025.2 (Debian 13) knows them all"
    ]
