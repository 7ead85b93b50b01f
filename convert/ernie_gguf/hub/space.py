"""What a conversion of a repository takes: known, and said, before it begins."""

from pathlib import Path

from ..convert import Job
from ..files import check_output, free_bytes
from ..units import human
from .source import Place, download, duration, say
from .stream import Stream, plan_stream


def announce(job: Job, place: Place, outfile: Path, mmproj: Path | None = None) -> None:
    """For --dry-run of a repository: what a conversion downloads and takes on the disk, both ways."""
    if place.repository is None:
        return
    say(_needs(place, plan_stream(job, place.repository, outfile, None, mmproj)))


def _needs(place: Place, stream: Stream) -> str:
    wanted, repository = place.wanted, stream.repository
    missing = repository.missing_bytes(wanted)
    folder = stream.paths[0].parent
    free = f"{human(free_bytes(folder))} free" if folder.is_dir() else "which is not there"
    return (
        f"{place.name} at {repository.commit[:12]}: {human(missing)} to download ({duration(missing)}), kept in "
        f"{repository.cache}; {human(stream.output_bytes)} to write to {folder} ({free}). With --stream nothing is "
        f"kept: {human(stream.output_bytes + stream.window_bytes)} of disk in all"
    )


def downloaded(job: Job, place: Place, outfile: Path, overwrite: bool, mmproj: Path | None) -> Path:
    """The folder with a repository's weights, after a download for which, and for the result, there is room.

    Raises:
        OutputError: the result may not be written; known before the download.
        HubError: the disk is too small, or the repository cannot be read.
    """
    if place.repository is None:
        return place.folder
    stream = plan_stream(job, place.repository, outfile, None, mmproj)
    for path in stream.paths:
        check_output(path, overwrite)
    hint = f"; with --stream it needs {human(stream.output_bytes + stream.window_bytes)} in all"
    return download(place, [(outfile.parent, stream.output_bytes, "the result")], hint)
