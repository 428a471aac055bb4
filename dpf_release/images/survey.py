"""Which images of a set cannot be decoded: found, counted, listed, and left out of every split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpf_release.core.arrays import Rows
from dpf_release.core.progress import Progress
from dpf_release.core.ranks import Ranks
from dpf_release.errors import ImageError
from dpf_release.images.dataset import BadImage, Pictures
from dpf_release.images.table import ImageTable


def survey(
    pictures: Pictures, on_progress: Callable[[int], None] | None = None, rows: Rows | None = None, batch_size: int = 64
) -> list[BadImage]:
    """Decodes these rows, or all, once, and returns those that cannot be; tells how many more are done."""
    rows = np.arange(len(pictures)) if rows is None else rows
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    bad: list[BadImage] = []
    for batch, (_, found) in zip(batches, pictures.stream(batches), strict=True):
        bad += found
        if on_progress is not None:
            on_progress(len(batch))
    return bad


def refuse_bad(bad: Sequence[BadImage], total: int, max_bad: float = 0.001) -> None:
    """Raises ImageError where more than a share `max_bad`, 0 to 1, of all images are bad; it lists the first 20."""
    if len(bad) > max_bad * total:
        names = "\n  ".join(f"{image.name} ({image.reason})" for image in bad[:20])
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ImageError(
            f"expected at most {max_bad:.3%} broken images (max_bad = {max_bad:g}), found {len(bad)} of {total}:\n  "
            f"{names}{more}\nRepair or remove them, or raise max_bad to go on without them."
        )


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one set, with the unreadable ones left out of every split and listed."""

    table: ImageTable  # of all images
    pictures: Pictures  # by row of the table
    bad: tuple[BadImage, ...]
    digest: str  # of the table and its files, as they were when this set was opened

    def rows(self, split_name: str) -> Rows:
        """Rows of a split, without the unreadable images, ascending."""
        return np.setdiff1d(self.table.rows_of(split_name), [image.row for image in self.bad])


def survey_together(pictures: Pictures, ranks: Ranks, title: str) -> list[BadImage]:
    """All pictures that cannot be decoded, each rank looking at its share."""
    mine = np.arange(len(pictures))[ranks.share(len(pictures))]
    with Progress(title, len(mine), shown=ranks.is_first) as progress:
        bad = survey(pictures, progress.advance, mine)
    if ranks.world_size == 1:
        return bad
    is_bad = np.isin(np.arange(len(pictures)), [image.row for image in bad])
    return survey(pictures, rows=np.flatnonzero(ranks.total(is_bad)))  # once more, for everyone to know the reasons
