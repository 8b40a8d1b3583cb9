# SPDX-License-Identifier: Apache-2.0
"""`semlic eval`: many images, codecs and rates; every number from a real file.

The folder of a sweep:

    results.json, results.csv   one row per image, codec and rate; sets.csv per set
    files/<codec>/...           every encoded file
    features/...                features of patches, for the metrics of the set
    journal.jsonl               what was done, line by line

Running the same command again goes on where it stopped: a file is encoded once and a
metric measured once, as long as the image, the codec and the metric stay the same.
Threads encode files while the metrics of earlier ones are measured.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semlic_jax.evaluation.codecs import FAILURES, reason_of
from semlic_jax.evaluation.entrants import Encoded, Entrant
from semlic_jax.evaluation.image_sets import readable_images
from semlic_jax.evaluation.journal import (
    JOURNAL,
    Journal,
    alone_in,
    is_measured,
    is_number,
)
from semlic_jax.evaluation.measures import Measures, read_features, write_features
from semlic_jax.evaluation.results import (
    CodecFacts,
    ImageFacts,
    Results,
    Row,
    SetRow,
    Skipped,
    rate_text,
)
from semlic_jax.images import write_file
from semlic_jax.training.sources import usable_cpus

# How many images' files may be ready and wait for their metrics; this bounds memory.
_IMAGES_AHEAD = 2
# What the journal tells of a file.
_FILE_FACTS = {"path", "bytes", "sha256", "setting", "encode_s"}


@dataclass(frozen=True)
class _File:
    """An encoded file of the sweep, or the reason why there is none."""

    path: Path | None
    facts: dict[str, Any]


def check_rates(rates: Sequence[float]) -> list[float]:
    """Check rates in bits per pixel, and sort them in ascending order.

    Raises:
      ValueError: there are no rates, one is given twice, or one is out of range.
    """
    if not rates:
        raise ValueError("expected rates in bits per pixel, found none")
    for rate in rates:
        if not 0 < rate <= 48:
            raise ValueError(
                f"expected rates above 0 and up to 48 bits per pixel, found {rate}"
            )
    for index, rate in enumerate(rates):
        if rate in rates[:index]:
            raise ValueError(f"the rate {rate_text(rate)} was given twice")
    return sorted(rates)


def run_sweep(
    paths: Sequence[Path],
    entrants: Sequence[Entrant],
    rates: Sequence[float],
    measures: Measures,
    out: Path,
    *,
    jobs: int = 0,
    background: tuple[int, int, int] | None = None,
    remeasure: bool = False,
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
    alone: bool = False,
) -> Results:
    """Encode, decode and measure; write the results into a folder and return them.

    Args:
      paths: image files; see `list_images`.
      entrants: codecs; see `entrants.py`.
      rates: bits per pixel.
      measures: metrics.
      out: folder, new or of an earlier sweep.
      jobs: threads that encode; 0: one for each core. With 1 nothing is measured while
        a file is encoded.
      background: RGB that transparent pixels are laid on; None: such images are
        skipped.
      remeasure: whether to measure again what was already measured.
      notes: sentences for a reader of the results.
      progress: called with a text about what is being done.
      alone: whether the caller is `alone_in` the folder; else it is locked here.

    Raises:
      ValueError: no image could be read, the folder holds something else, or another
        evaluation is running in it.
    """
    rates = check_rates(rates)
    with contextlib.nullcontext() if alone else alone_in(out):
        sweep = _Sweep(entrants, rates, measures, out, remeasure=remeasure)
        skipped: list[Skipped] = []
        loaded = readable_images(paths, background, skipped)
        images, rows = sweep.run(loaded, jobs, _Clock(len(paths), progress))
        if not images:
            raise ValueError(
                f"none of the {len(paths)} images could be read; the first: "
                f"{skipped[0].reason}"
            )
        progress("distances of the sets")
        notes = [*notes, *_left_out(images, measures)]
        results = Results(
            images=tuple(images),
            skipped=tuple(skipped),
            codecs={e.key: CodecFacts(e.label, e.identity) for e in entrants},
            image_metrics=measures.image_metrics,
            set_metrics=measures.set_metrics,
            rows=tuple(rows),
            set_rows=tuple(sweep.measure_sets(images)) if measures.set_metrics else (),
            notes=tuple(notes),
        )
        write_results(results, out)
        return results


def _left_out(images: Sequence[ImageFacts], measures: Measures) -> list[str]:
    """A sentence on the images that the metrics of the set leave out, if any."""
    side = measures.patch_side
    small = sum(min(image.width, image.height) < side for image in images)
    if not measures.set_metrics or not 0 < small < len(images):
        return []
    return [
        f"The metrics of the set leave out {small} of {len(images)} images, which are "
        f"smaller than a patch of {side} pixels"
    ]


def write_results(results: Results, out: Path) -> None:
    """Write `results.json`, `results.csv` and `sets.csv`, replacing older ones."""
    texts = {
        "results.json": results.to_json(),
        "results.csv": results.to_csv(),
        "sets.csv": results.set_csv(),
    }
    for name, text in texts.items():
        # Names of images need not be UTF-8.
        write_file(out / name, text.encode("utf-8", "surrogateescape"), force=True)


class _Clock:
    """Progress, with the time left as estimated from the images done in this run."""

    def __init__(self, count: int, progress: Callable[[str], None]) -> None:
        self._count, self._done, self._progress = count, 0, progress
        self._start_s = time.perf_counter()

    def one_done(self) -> None:
        self._done += 1

    def say(self, text: str) -> None:
        left = ""
        if self._done:
            wall_s = time.perf_counter() - self._start_s
            left_s = wall_s / self._done * (self._count - self._done)
            left = f", about {left_s / 60:.0f} min left" if left_s > 90 else ""
        self._progress(f"{self._done}/{self._count} images{left}: {text}")


class _Sweep:
    """The two steps of a sweep and the files that they leave."""

    def __init__(
        self,
        entrants: Sequence[Entrant],
        rates: Sequence[float],
        measures: Measures,
        out: Path,
        *,
        remeasure: bool,
    ) -> None:
        self._entrants, self._rates, self._measures = entrants, rates, measures
        self._out = out
        self._journal = Journal(out / JOURNAL)
        self._journal.put("sweep", {"started": time.strftime("%Y-%m-%dT%H:%M:%S")})
        self._remeasure = remeasure
        self._remeasured: set[str] = set()
        # By (codec, rate) and image: each trunk's file of features, or a reason.
        self._features: dict[tuple[str, float], dict[str, dict[str, Path] | str]] = {}
        self._bpps: dict[tuple[str, float], dict[str, float]] = {}
        self._originals: dict[str, dict[str, Path] | str] = {}

    def run(
        self,
        loaded: Iterable[tuple[ImageFacts, np.ndarray]],
        jobs: int,
        clock: _Clock,
    ) -> tuple[list[ImageFacts], list[Row]]:
        """Encode and measure all images; return them with one row for each file."""
        images: list[ImageFacts] = []
        rows: list[Row] = []
        with ThreadPoolExecutor(jobs or usable_cpus()) as pool:
            waiting: deque[tuple[ImageFacts, np.ndarray, list[Future[list[_File]]]]] = (
                deque()
            )

            def measure_one() -> None:
                image, pixels, encoded = waiting.popleft()
                for entrant, future in zip(self._entrants, encoded, strict=True):
                    clock.say(f"{image.name}, {entrant.key}")
                    for rate, file in zip(self._rates, future.result(), strict=True):
                        rows.append(self.measure(image, pixels, entrant, rate, file))
                images.append(image)
                clock.one_done()

            try:
                for image, pixels in loaded:
                    encoded = [
                        pool.submit(self.encode, image, pixels, entrant)
                        for entrant in self._entrants
                    ]
                    if jobs == 1:  # nothing else runs while a file is timed
                        wait(encoded)
                    waiting.append((image, pixels, encoded))
                    if len(waiting) > _IMAGES_AHEAD:
                        measure_one()
                while waiting:
                    measure_one()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return images, rows

    def encode(
        self, image: ImageFacts, pixels: np.ndarray, entrant: Entrant
    ) -> list[_File]:
        """The files of one image by one codec, from the cache if they are there."""
        # For the first file that is not there; where it fails, so does each of them.
        fitter = functools.cache(lambda: entrant.fitter(pixels))
        files = []
        for rate in self._rates:
            key = f"file {image.sha256} {entrant.key} {rate_text(rate)}"
            known = self._journal.get(key, "identity")
            if known is None or not self._is_current(known, entrant):
                known = self._encode_one(
                    key, image, entrant, rate, lambda bpp: fitter()(bpp)
                )
            path = self._out / known["path"] if "path" in known else None
            files.append(_File(path, known))
        return files

    def _is_current(self, known: dict[str, Any], entrant: Entrant) -> bool:
        if known["identity"] != entrant.identity:
            return False
        if "reason" in known:
            return isinstance(known["reason"], str)
        if not known.keys() >= _FILE_FACTS or not isinstance(known["path"], str):
            return False
        if not isinstance(known["setting"], str) or not is_number(known["encode_s"]):
            return False
        path = self._out / known["path"]
        if not path.is_file():
            return False
        data = path.read_bytes()
        return (len(data), _sha256(data)) == (known["bytes"], known["sha256"])

    def _encode_one(
        self,
        key: str,
        image: ImageFacts,
        entrant: Entrant,
        rate: float,
        fit: Callable[[float], Encoded],
    ) -> dict[str, Any]:
        known: dict[str, Any] = {"identity": entrant.identity}
        try:
            encoded = fit(rate)
        except FAILURES as error:
            known["reason"] = reason_of(error)
            # Others may be due to this machine or moment: the next run tries again.
            if isinstance(error, ValueError):
                self._journal.put(key, known)
            return known
        stem = f"{_slug(Path(image.name).stem)}-{image.sha256[:8]}"
        name = f"files/{_slug(entrant.key)}/{stem}@{rate_text(rate)}{entrant.suffix}"
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, encoded.data, force=True)
        known |= {
            "path": name,
            "bytes": len(encoded.data),
            "sha256": _sha256(encoded.data),
            "setting": encoded.setting,
            "encode_s": round(encoded.encode_s, 4),
        }
        self._journal.put(key, known)
        return known

    def measure(
        self,
        image: ImageFacts,
        pixels: np.ndarray,
        entrant: Entrant,
        rate: float,
        file: _File,
    ) -> Row:
        """Make one row; decode the file if something about it is not known yet."""
        at = (entrant.key, rate)
        features = self._features.setdefault(at, {})
        if file.path is None:
            reason = str(file.facts["reason"])
            features[image.sha256] = f"{image.name}: {reason}"
            return Row(image.name, entrant.key, rate, gaps={"file": reason})
        # The same bytes become another picture under another decoder.
        sha256 = _sha256(f"{entrant.identity} {file.facts['sha256']}".encode())
        key = f"measure {image.sha256} {sha256}"
        record = dict(self._journal.get(key, "values", "gaps") or {})
        if not is_measured(record) or (self._remeasure and key not in self._remeasured):
            record = {"values": {}, "gaps": {}}
        self._remeasured.add(key)
        failed: dict[str, str] = {}
        try:
            missing = self._missing(record)
            wanted = self._features_known(sha256, pixels.shape)
            if missing or wanted is None or "decode_s" not in record:
                decoded, decode_s = _decoded(entrant, file, pixels.shape)
                record["decode_s"] = decode_s
                failed = self._add_values(record, pixels, decoded, missing)
                wanted = self._features_of(sha256, decoded)
                self._journal.put(key, record)
            if image.sha256 not in self._originals:
                self._originals[image.sha256] = self._features_of(image.sha256, pixels)
        except FAILURES as error:  # not kept: the next run tries again
            reason = f"it was not measured: {reason_of(error)}"
            wanted = f"{image.name}: {reason}"
            failed |= dict.fromkeys(self._missing(record), reason)
        features[image.sha256] = wanted
        bpp = 8 * file.facts["bytes"] / (image.width * image.height)
        self._bpps.setdefault(at, {})[image.sha256] = bpp
        names = list(self._measures.image_metrics)
        return Row(
            image=image.name,
            codec=entrant.key,
            target_bpp=rate,
            bpp=bpp,
            file_bytes=file.facts["bytes"],
            setting=file.facts["setting"],
            encode_s=file.facts["encode_s"],
            decode_s=record.get("decode_s"),
            # A value that was kept of a metric that failed now is of other weights.
            values={
                n: record["values"][n][1]
                for n in names
                if n in record["values"] and n not in failed
            },
            gaps={n: record["gaps"][n][1] for n in names if n in record["gaps"]}
            | failed,
        )

    def _missing(self, record: dict[str, Any]) -> list[str]:
        """Metrics that were not measured, or were measured in another way than now."""
        known = {**record["values"], **record["gaps"]}
        return [
            name
            for name in self._measures.image_metrics
            if name not in known or known[name][0] != self._measures.identity(name)
        ]

    def _add_values(
        self,
        record: dict[str, Any],
        pixels: np.ndarray,
        decoded: np.ndarray,
        names: Sequence[str],
    ) -> dict[str, str]:
        """Keep what was measured; return the metrics that failed, and why."""
        values, gaps, failed = self._measures.measure(pixels, decoded, names)
        for kind, found in (("values", values), ("gaps", gaps)):
            kept = {k: v for k, v in record[kind].items() if k not in names}
            identities = {k: [self._measures.identity(k), v] for k, v in found.items()}
            record[kind] = kept | identities
        return {k: f"it was not measured: {why}" for k, why in failed.items()}

    def _feature_paths(self, sha256: str) -> dict[str, Path]:
        folder = self._out / "features"
        return {
            trunk: folder / f"{sha256[:32]}.{identity}.npy"
            for trunk, identity in self._measures.trunks.items()
        }

    def _features_known(
        self, sha256: str, image_shape: tuple[int, ...]
    ) -> dict[str, Path] | str | None:
        paths = self._feature_paths(sha256)
        if self._remeasure and f"features {sha256}" not in self._remeasured:
            return None
        for trunk, path in paths.items():
            found = read_features(path)
            shape = self._measures.features_shape(image_shape, trunk)
            if found is None or found.shape != shape:
                return None
        return paths

    def _features_of(self, sha256: str, image: np.ndarray) -> dict[str, Path] | str:
        """Files with the features of an image, or the reason why there are none."""
        known = self._features_known(sha256, image.shape)
        if known is not None:
            return known
        self._remeasured.add(f"features {sha256}")
        paths = self._feature_paths(sha256)
        for trunk, path in paths.items():
            try:
                features = self._measures.features(image, trunk)
            except ValueError as error:
                return str(error)
            write_features(path, features)
        return paths

    def measure_sets(self, images: Sequence[ImageFacts]) -> Iterator[SetRow]:
        """Yield one row per codec and rate, over the images that are large enough."""
        names = list(self._measures.set_metrics)
        side = self._measures.patch_side
        used = [i.sha256 for i in images if min(i.width, i.height) >= side]
        too_small = len(images) - len(used)
        loaded: dict[str, dict[str, np.ndarray]] = {}
        for entrant in self._entrants:
            for rate in self._rates:
                found = self._features[entrant.key, rate]
                reasons = [r for r in map(found.get, used) if isinstance(r, str)]
                why = ""
                if reasons:
                    count = f"{len(reasons)} of {len(used)} images"
                    why = f"{count} have none ({reasons[0]})"
                elif not used:
                    why = f"no image holds a patch of {side} pixels"
                if why:
                    yield SetRow(entrant.key, rate, gaps=dict.fromkeys(names, why))
                    continue
                bpps = self._bpps[entrant.key, rate]
                bpp = float(np.mean([bpps[sha256] for sha256 in used]))
                for sha256 in used:
                    if sha256 not in loaded:
                        loaded[sha256] = _load_trunks(self._originals[sha256])
                decoded = [_load_trunks(found[sha256]) for sha256 in used]
                values, gaps, patches = self._measures.distances(
                    _by_trunk([loaded[sha256] for sha256 in used]), _by_trunk(decoded)
                )
                if too_small:
                    left_out = f"{too_small} images are smaller than a patch"
                    gaps = {**gaps, "images left out": left_out}
                yield SetRow(entrant.key, rate, bpp, values, patches, gaps)


def _decoded(
    entrant: Entrant, file: _File, shape: tuple[int, ...]
) -> tuple[np.ndarray, float]:
    """Decode a file to an image of this shape; return it and the seconds it took."""
    path = file.path
    assert path is not None
    data = path.read_bytes()
    if _sha256(data) != file.facts["sha256"]:
        raise RuntimeError(f"{path} was changed while the sweep ran")
    start_s = time.perf_counter()
    decoded = entrant.decode(data)
    wall_s = time.perf_counter() - start_s
    if decoded.shape != shape:
        raise RuntimeError(
            f"{entrant.key} decoded {path} to {decoded.shape}, the image is {shape}"
        )
    return decoded, round(wall_s, 4)


def _load_trunks(paths: dict[str, Path] | str) -> dict[str, np.ndarray]:
    """Features by trunk, from files that were whole before."""
    assert not isinstance(paths, str)
    loaded = {}
    for trunk, path in paths.items():
        features = read_features(path)
        if features is None:
            raise ValueError(f"{path} was changed while the sweep ran")
        loaded[trunk] = features
    return loaded


def _by_trunk(images: Sequence[dict[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    return {trunk: [image[trunk] for image in images] for trunk in images[0]}


def _slug(text: str) -> str:
    """A name for a file or folder; different texts have different names."""
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "_", text)[:80]
    return slug if slug == text else f"{slug}-{_sha256(os.fsencode(text))[:8]}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
