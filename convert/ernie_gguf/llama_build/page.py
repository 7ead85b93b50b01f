"""The page that llama-server shows in a browser: upstream's tools/ui, built with npm where that is installed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

from .process import BuildError, run
from .recipe import Job, digest

INSTALL = ("npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=1")


def provide_page(job: Job, report: Callable[[str, int, int], None]) -> bool:
    """Put the built page where llama.cpp's build looks for it first, `tools/ui/dist` of the tree; False without one.

    It is built once for the same sources. A failure is told on stderr and is not an error: llama.cpp's build then tries
    to download upstream's page, and the server works without.
    """
    source, target = job.tree / "tools" / "ui", job.tree / "tools" / "ui" / "dist"
    if not (source / "package.json").is_file():
        return False
    shutil.rmtree(target, ignore_errors=True)
    built = job.folder / "page" / digest(source)[:16]
    if not (built / "index.html").is_file():
        npm = shutil.which("npm")
        if npm is None:
            return False
        work, fresh = job.folder / "page" / "work", job.folder / "page" / "new"
        for each in (work, fresh):
            shutil.rmtree(each, ignore_errors=True)
        shutil.copytree(source, work)
        log = job.folder / "page.log"
        try:
            report("install the page's packages (npm)", 0, 0)
            run((npm, *INSTALL[1:]), log, lambda _: None, work)
            report("build the page (npm)", 0, 0)
            run((npm, "run", "build"), log, lambda _: None, work, LLAMA_UI_OUT_DIR=str(fresh))
        except BuildError as error:
            sys.stderr.write(f"note: llama-server's page was not built: {error}\n")
            return False
        finally:
            shutil.rmtree(work, ignore_errors=True)
        fresh.rename(built)
    shutil.copytree(built, target)
    return True


def page_state(job: Job) -> str | None:
    """Why llama-server has no page; None if it has one."""
    header = job.build / "tools" / "ui" / "ui.h"
    if header.is_file() and "LLAMA_UI_HAS_ASSETS 1" in header.read_text():
        return None
    if not (job.tree / "tools" / "ui" / "package.json").is_file():
        return "these sources have none"
    if not job.page:
        return "it was not asked for"
    if shutil.which("npm") is None:
        return "npm is not installed, and upstream's could not be downloaded"
    return f"npm could not build it, see {job.folder / 'page.log'}"
