# SPDX-License-Identifier: Apache-2.0
"""Refinement: budgets, the guard, gradients, limits, seeds, interruption, folders."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_trunk import load_small_trunk

from semlic_jax import cli, memory, refinement
from semlic_jax.refinement import fit
from semlic_jax.refinement import folder as folder_module
from semlic_jax.refinement import steps as steps_module
from semlic_jax.refinement.batch import Batch
from semlic_jax.refinement.steps import Schedule, State, soft_terms
from semlic_jax.refinement.symbols import Rounding

# One size for all: an image that does not fill its bucket, so that masks matter.
SIZE = (56, 64)
SETTINGS = refinement.preset(40, gamma=0.0, method="sga", chunk_steps=10)
PLAIN = Rounding(np.zeros(1, np.float32))


@pytest.fixture(scope="module")
def image(photograph):
    return photograph(*SIZE, seed=3)


@pytest.fixture(scope="module")
def refined(mini_codec, image):
    """A refinement that others are compared with."""
    return refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)


def new_batch(codec, image, quality=0.5, settings=SETTINGS):
    unrefined = codec.compress(image, quality=quality)
    return Batch(
        codec, settings, [image], [len(unrefined)], [None], [None], [unrefined]
    )


def squared_error(codec, data, image):
    return np.mean((codec.decompress(data).astype(float) - image) ** 2)


def test_files_are_better_at_no_more_bytes(mini_codec, image, refined):
    assert len(refined.data) <= len(refined.unrefined)
    assert refined.value < 0.99 * refined.unrefined_value
    for data, value in (
        (refined.data, refined.value),
        (refined.unrefined, refined.unrefined_value),
    ):
        mse = squared_error(mini_codec, data, image)
        assert SETTINGS.alpha * mse == pytest.approx(value, rel=1e-4)


def test_they_are_ordinary_files(mini_codec, refined):
    info = mini_codec.info(refined.data)
    assert (info["height"], info["width"]) == SIZE
    assert info["model"] == mini_codec.name


@pytest.mark.parametrize("share", [0.6, 0.85, 1.0, 1.5])
def test_never_over_budget_and_never_worse(mini_codec, image, share):
    """Also where the budget is not what a quality gives, and with hardly any steps."""
    smallest = len(mini_codec.compress(image, quality=0))
    largest = len(mini_codec.compress(image, quality=1))
    budget = round(smallest + share * (largest - smallest))
    settings = dataclasses.replace(SETTINGS, steps=3)
    found = refinement.refine(mini_codec, image, max_bytes=budget, settings=settings)
    assert len(found.data) <= budget
    assert found.value <= found.unrefined_value


def test_harm_is_not_passed_on(mini_codec, image):
    """Steps that ruin the latents leave the file without refinement."""
    ruinous = dataclasses.replace(SETTINGS, steps=10, learning_rate=30.0)
    found = refinement.refine(mini_codec, image, quality=0.5, settings=ruinous)
    assert found.value <= found.unrefined_value
    assert len(found.data) <= len(found.unrefined)


def test_the_same_seed_gives_the_same_file(mini_codec, image, refined):
    again = refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)
    assert again.data == refined.data
    other = dataclasses.replace(SETTINGS, seed=1)
    found = refinement.refine(mini_codec, image, quality=0.5, settings=other)
    assert found.history != refined.history


def test_stopping_keeps_the_best_so_far(mini_codec, image, refined):
    seen = []

    def stop(now):
        seen.append(now)
        return False

    found = refinement.refine(
        mini_codec, image, quality=0.5, settings=SETTINGS, progress=stop
    )
    assert [now.step for now in seen] == [10] and seen[0].steps == 40
    assert found.steps == 10 and refined.steps == 40
    assert found.value <= found.unrefined_value
    assert len(found.data) <= len(found.unrefined)
    # What was shown is what the rounded latents cost and give.
    assert found.history == refined.history[:1]
    assert found.history[0]["bpp"] == pytest.approx(seen[0].bpp[0])


def test_the_front_door(mini_codec, image):
    data = mini_codec.compress(image, quality=0.5, refine=SETTINGS, roi=None)
    assert data == mini_codec.compress(image, quality=0.5, refine=SETTINGS)
    with pytest.raises(ValueError, match="needs refine"):
        mini_codec.compress(image, quality=0.5, roi="auto")
    with pytest.raises(ValueError, match="uint8"):
        mini_codec.compress(image / 255, quality=0.5, refine=SETTINGS, roi="auto")


def test_rates_in_the_scan_are_those_of_the_coder(codec, photograph):
    """With every context network, on latents that were moved off their places."""
    image = photograph(120, 128)
    settings = refinement.preset(1, gamma=0.0)
    unrefined = codec.compress(image, quality=0.9)
    made = Batch(
        codec, settings, [image], [len(unrefined)], [None], [None], [unrefined]
    )
    rng = np.random.default_rng(0)
    y_scaled, z = (
        x + 0.4 * rng.standard_normal(x.shape).astype(np.float32) for x in made.start
    )
    terms, y_hat = fit.score(made.frozen, made.images, made.weights, PLAIN, y_scaled, z)
    bits = float(terms.bpp[0]) * image.shape[0] * image.shape[1]
    level, size = made.jobs[0].level, made.jobs[0].size
    symbols = codec.entropy.symbols(
        np.asarray(y_hat[0]), np.round(np.asarray(z[0])), level, size
    )
    assert bits == pytest.approx(codec.entropy.ideal_bits(symbols, size), rel=1e-5)
    payload = codec.entropy.encode(symbols, size)
    assert 8 * len(payload) == pytest.approx(bits, rel=0.005)


@pytest.fixture(scope="module")
def settled(mini_codec, image):
    """A batch with its rounded latents and their terms."""
    made = new_batch(mini_codec, image)
    terms, y_hat = fit.score(
        made.frozen,
        made.images,
        made.weights,
        PLAIN,
        *made.start,
    )
    return made, jnp.asarray(y_hat), jnp.round(made.start[1]), terms


def test_low_temperatures_recover_hard_rounding(settled):
    """At 0.2 from their values, latents settle on them; the density is the table."""
    made, y_hat, z_hat, hard = settled
    soft = jax.jit(soft_terms)(
        made.frozen,
        made.images,
        made.weights,
        y_hat + 0.2,
        z_hat - 0.2,
        made.rng,
        jnp.float32(0.01),
        jnp.int32(0),
    )
    np.testing.assert_allclose(soft.mse, hard.mse, rtol=1e-4)
    np.testing.assert_allclose(soft.bpp, hard.bpp, rtol=0.03)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_gradients_are_finite_on_the_grid(settled, temperature):
    """One real step from latents that are where the coder would put them."""
    made, y_hat, z_hat, _ = settled
    schedule = Schedule(
        np.zeros(1, np.int32),
        np.full(1, temperature, np.float32),
        np.full(1, 0.01, np.float32),
        np.zeros(1, np.int32),
    )
    gradients = []
    for offset in (0.0, 0.4):
        latents = (y_hat + offset, z_hat + offset)
        zeros = [jax.tree.map(jnp.zeros_like, latents) for _ in range(2)]
        state, terms = steps_module.run_steps(
            made.frozen,
            made.images,
            made.weights,
            made.target,
            made.rng,
            State(latents, *zeros, jnp.copy(made.log_beta)),
            schedule,
        )
        for leaf in jax.tree.leaves((state, terms)):
            assert np.isfinite(np.asarray(leaf)).all()
        gradients.append(max(np.abs(leaf).max() for leaf in state.first))
    # On the grid itself hardly anything moves, between its points everything does.
    assert gradients[1] > gradients[0]


def test_perceptual_terms_count(mini_codec, image):
    settings = refinement.preset(
        20, alpha=0.0, gamma=1.0, style=0.1, features=load_small_trunk()
    )
    found = refinement.refine(mini_codec, image, quality=0.5, settings=settings)
    assert found.value < found.unrefined_value
    assert len(found.data) <= len(found.unrefined)


@pytest.mark.slow
def test_batches_have_budgets_of_their_own(mini_codec, photograph):
    images = [photograph(*SIZE, seed=3), photograph(64, 50, seed=4)]
    starts = [mini_codec.compress(images[0], quality=0.4)]
    starts += [mini_codec.compress(images[1], quality=0.8)]
    budgets = [len(start) for start in starts]
    found = refinement.refine_batch(
        mini_codec, images, max_bytes=budgets, settings=SETTINGS
    )
    for image, start, budget, each in zip(images, starts, budgets, found, strict=True):
        assert len(each.data) <= budget
        assert each.value < each.unrefined_value
        own = squared_error(mini_codec, each.data, image)
        assert own < squared_error(mini_codec, start, image)


def test_too_large_batches_are_halved(mini_codec, image, monkeypatch):
    """A device without room for more than one image at a time."""

    class Narrow(Batch):
        def __init__(self, codec, settings, pixels, *rest):
            if len(pixels) > 1:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            super().__init__(codec, settings, pixels, *rest)

    # By its name: `refinement.refine` is the function.
    monkeypatch.setattr(sys.modules["semlic_jax.refinement.refine"], "Batch", Narrow)
    budgets = [len(mini_codec.compress(image, quality=q)) for q in (0.4, 0.5, 0.6)]
    settings = dataclasses.replace(SETTINGS, steps=2)
    with pytest.warns(refinement.RefinementWarning) as noted:
        found = refinement.refine_batch(
            mini_codec, [image] * 3, max_bytes=budgets, settings=settings
        )
    assert [str(note.message).partition("for ")[2] for note in noted] == [
        "a batch of 3: continuing with 2",
        "a batch of 2: continuing with 1",
    ]
    assert len(found) == 3
    assert all(len(f.data) <= b for f, b in zip(found, budgets, strict=True))


def test_a_stop_holds_for_all_parts_of_a_batch(mini_codec, image, monkeypatch):
    """A caller that says so once, and a batch that is halved."""
    monkeypatch.setattr(memory, "available_bytes", lambda: None)

    class Narrow(Batch):
        def __init__(self, codec, settings, pixels, *rest):
            if len(pixels) > 1:
                raise MemoryError("for one image alone")
            super().__init__(codec, settings, pixels, *rest)

    monkeypatch.setattr(sys.modules["semlic_jax.refinement.refine"], "Batch", Narrow)
    seen = []

    def stop_once(now):
        seen.append((now.step, now.bpp.shape))
        return len(seen) > 1

    with pytest.warns(refinement.RefinementWarning):
        found = refinement.refine_batch(
            mini_codec,
            [image] * 2,
            max_bytes=[len(mini_codec.compress(image, quality=0.5))] * 2,
            settings=dataclasses.replace(SETTINGS, chunk_steps=2),
            progress=stop_once,
        )
    assert [each.steps for each in found] == [2, 2] and seen == [(2, (1,))]


def test_batches_that_a_cpu_has_no_room_for_are_halved(mini_codec, image, monkeypatch):
    """A byte is left for two images, and enough for one."""
    left = iter([1, None, None])
    monkeypatch.setattr(memory, "available_bytes", lambda: next(left))
    budget = len(mini_codec.compress(image, quality=0.5))
    settings = dataclasses.replace(SETTINGS, steps=2)
    with pytest.warns(refinement.RefinementWarning, match="a batch of 2: continuing"):
        found = refinement.refine_batch(
            mini_codec, [image] * 2, max_bytes=[budget] * 2, settings=settings
        )
    assert len(found) == 2 and next(left, "none") == "none"


@pytest.mark.parametrize("method", ["newton", "sga"])
def test_an_image_that_a_cpu_has_no_room_for(mini_codec, image, monkeypatch, method):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    settings = dataclasses.replace(SETTINGS, method=method)
    with pytest.raises(MemoryError, match=r"refining \d+ pixels .* found 0.0 GiB"):
        refinement.refine(mini_codec, image, quality=0.5, settings=settings)


def test_enough_room_is_not_refused(monkeypatch):
    def not_asked():
        raise AssertionError("plenty is left")

    left = memory.available_bytes()
    if left is not None:
        assert 2**20 < left < 2**50
    memory.require_memory("refining", 1, not_asked)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2000)
    memory.require_memory("refining", 1, lambda: 2000)
    memory.require_memory("refining", 1, lambda: None)
    with pytest.raises(MemoryError):
        memory.require_memory("refining", 1, lambda: 2001)


def test_batches_are_of_one_bucket(mini_codec, image, photograph):
    with pytest.raises(ValueError, match="one padded size"):
        refinement.refine_batch(
            mini_codec,
            [image, photograph(64, 100)],
            max_bytes=[200, 300],
            settings=SETTINGS,
        )


def test_neighbours_do_not_change_the_first_multiplier(mini_codec, image):
    """The coarsest file and the finest: one probes upwards, the other downwards."""
    files = [mini_codec.compress(image, quality=quality) for quality in (0.0, 1.0)]
    settings = dataclasses.replace(SETTINGS, overshoot=0.0)

    def start(*files):
        budgets, nothing = [len(data) for data in files], [None] * len(files)
        images = [image] * len(files)
        return Batch(mini_codec, settings, images, budgets, nothing, nothing, files)

    both = start(*files)
    levels = [job.level for job in both.jobs]
    assert levels[0] < 16 and levels[1] == 255
    alone = [start(data).log_beta[0] for data in files]
    np.testing.assert_allclose(both.log_beta, alone, rtol=1e-4)


def test_a_profile_does_not_change_where_an_image_starts(mini_codec, image):
    """However much of the file it takes."""

    def job(profile):
        data = mini_codec.compress(image, quality=0.5, icc_profile=profile)
        lists = [len(data)], [None], [profile], [data]
        return Batch(mini_codec, SETTINGS, [image], *lists).jobs[0]

    plain, profiled = job(None), job(3000 * b"p")
    # The head of the chunk that holds it is 7 of 202 bytes.
    assert plain.level < 200 and abs(profiled.level - plain.level) <= 2
    assert profiled.payload_bits == pytest.approx(plain.payload_bits, abs=16)


def test_unrefined_files_that_do_not_fit_are_refused(mini_codec, image, photograph):
    data = mini_codec.compress(image, quality=0.5)
    other = mini_codec.compress(photograph(50, 60), quality=0.2)
    for budget, start, message in (
        (len(data) - 1, data, f"at most {len(data) - 1} bytes, found {len(data)}"),
        (len(data), other, "unrefined file of 64 x 56 pixels, found 60 x 50"),
        (len(data), data, "more than 500 bytes, which the colour profile takes"),
    ):
        with pytest.raises(ValueError, match=message):
            refinement.refine_batch(
                mini_codec,
                [image],
                max_bytes=[budget],
                unrefined=[start],
                icc_profiles=[500 * b"p"],
                settings=SETTINGS,
            )


def test_whole_numbers_are_the_same_settings():
    assert repr(refinement.preset(gamma=0)) == repr(refinement.preset(gamma=0.0))
    assert type(refinement.preset(beta=np.float32(2)).beta) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps of at least 1, found 0"),
        (dict(alpha=-1.0), "alpha of at least 0, found -1"),
        (dict(gamma=-0.5), "gamma of at least 0, found -0.5"),
        (dict(gamma=float("nan")), "gamma of at least 0, found nan"),
        (dict(beta=0.0), "beta above 0"),
        (dict(alpha=0.0, gamma=0.0), "alpha or gamma of at least 1e-12, found 0 and 0"),
        (dict(alpha=1e-46, gamma=0), "alpha or gamma of at least .* found 1e-46 and 0"),
        (
            dict(method="magic"),
            "unknown rounding method 'magic': expected one of .*newton",
        ),
        (dict(dtype="int8"), "float32 or bfloat16"),
        (dict(temperature_end=0.0), "temperature_end from 1e-06 to 1e"),
        (dict(temperature_end=1e-46), "temperature_end from .*, found 1e-46"),
        (dict(temperature_start=float("nan")), "temperature_start from .*, found nan"),
        (dict(probes=0), "probes of at least 1, found 0"),
        (dict(kappa=0.0), "kappa above 0, found 0"),
        (dict(kappa=float("inf")), "kappa from .* to .*, found inf"),
        (dict(trust_start=0.0), "trust_start above 0 and at most 1, found 0"),
        (dict(trust_end=1.5), "trust_end above 0 and at most 1, found 1.5"),
        (dict(trust_rise=-0.1), "trust_rise of at least 0, found -0.1"),
        (dict(trust_rise=1.5), "trust_rise of at most 1, found 1.5"),
        (dict(noise=-1.0), "noise of at least 0, found -1"),
        (dict(z_travel=-0.1), "z_travel of at least 0, found -0.1"),
        (dict(newton_integral=-1.0), "newton_integral of at least 0, found -1"),
        (dict(integral=-1.0), "integral of at least 0, found -1"),
        (dict(proportional=float("nan")), "proportional of at least 0, found nan"),
        (dict(alpha=1e39), r"alpha of at most 1e\+12, found 1e\+39"),
        (dict(kappa=1e39), r"kappa from .* to 1e\+12, found 1e\+39"),
        (dict(beta=1e-60), "beta from .* to .*, found 1e-60"),
        (dict(decay=1.5), "decay from 0 to 1, found 1.5"),
        (dict(decay=float("nan")), "decay from 0 to 1, found nan"),
        (dict(overshoot=-1.0), "overshoot above -1 and at most 10, found -1"),
        (dict(overshoot=float("inf")), "overshoot above -1 and at most 10, found inf"),
        (dict(gamma="0.5"), "a number as gamma, found '0.5'"),
        (dict(trust_end=[1, 2]), r"a number as trust_end, found \[1, 2\]"),
        (dict(gamma=10**400), "a number as gamma, found 1000"),
        (dict(steps=2.5), "a whole number as steps, found 2.5"),
        (dict(chunk_steps=float("nan")), "a whole number as chunk_steps, found nan"),
        (dict(probes=2.5), "a whole number as probes, found 2.5"),
        (dict(seed=1.5), "a whole number as seed, found 1.5"),
        (dict(seed=-1), "a seed from 0 to 4294967295, found -1"),
        (dict(seed=2**32), "a seed from 0 to 4294967295, found 4294967296"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        refinement.preset("default", **changes)


def test_presets():
    steps = [refinement.preset(name).steps for name in ("fast", "default", "best")]
    assert steps == sorted(steps) and len(set(steps)) == 3
    assert refinement.preset(7).steps == 7
    assert refinement.preset(np.int64(7)) == refinement.preset(7)
    with pytest.raises(ValueError, match="whole number as steps, found 7.5"):
        refinement.preset(7.5)
    # Relaxed rounding takes more steps, unless their number is said.
    relaxed = refinement.preset("fast", method="sga")
    assert relaxed.method == "sga" and relaxed.steps > 3 * steps[0]
    assert refinement.preset("fast", method="sga", steps=None) == relaxed
    assert refinement.preset("fast", method="newton").steps == steps[0]
    assert refinement.preset("fast", method="sga", steps=4).steps == 4
    assert refinement.preset(7, method="sga").steps == 7
    # Files of a relaxed rounding depend on how often it is looked at.
    for name in ("fast", 7):
        chunk = refinement.preset(name, method="sga").chunk_steps
        assert (
            chunk
            == refinement.Settings.chunk_steps
            > refinement.preset(name).chunk_steps
        )
    assert refinement.preset("fast", alpha=None) == refinement.preset("fast")
    with pytest.raises(ValueError, match=r"preset \(fast, default, best\).*'slow'"):
        refinement.preset("slow")


def test_unreachable_budgets_are_refused(mini_codec, image):
    with pytest.raises(ValueError, match="expected a budget from .* found 20 bytes"):
        refinement.refine(mini_codec, image, max_bytes=20, settings=SETTINGS)


def test_missing_feature_weights_are_refused(mini_codec, image, tmp_path):
    settings = refinement.preset(5, gamma=1.0, features=str(tmp_path))
    with pytest.raises(ValueError, match="feature weights.*gamma 0"):
        refinement.refine(mini_codec, image, quality=0.5, settings=settings)


# The command line.


@pytest.fixture
def semlic(capsys, mini_model):
    """Runs a command with the mini model; gives status, output and errors."""

    def run(*argv):
        argv = [str(arg) for arg in argv]
        if argv[0] in ("compress", "refine"):
            argv += ["--model", str(mini_model)]
        try:
            status = cli.main(argv)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def photo(tmp_path, monkeypatch, image):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(image).save("photo.png")
    return tmp_path


STEPS = ("--refine", 40, "--gamma", 0)


def test_compress_refines(semlic, photo, mini_codec, mini_model, image):
    plain = mini_codec.compress(image, quality=0.5)
    bpp = 8 * len(plain) / image.size * 3
    status, out, err = semlic("compress", "photo.png", "--bpp", bpp, *STEPS)
    assert (status, err) == (0, "") and "40 steps" in out
    with open("photo.semlic", "rb") as stream:
        data = stream.read()
    assert len(data) <= len(plain)
    better = squared_error(mini_codec, data, image)
    assert better < squared_error(mini_codec, plain, image)
    back_again = ("decompress", "photo.semlic", "back.png", "--model", mini_model)
    assert semlic(*back_again)[0] == 0
    with Image.open("back.png") as back:
        assert back.size == (64, 56)


def test_an_interrupt_keeps_the_best(semlic, photo, monkeypatch):
    score = Batch.score
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # two are for the slope, then come looks after steps
            signal.raise_signal(signal.SIGINT)
        return score(*args)

    monkeypatch.setattr(Batch, "score", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    status, out, err = semlic(
        "compress", "photo.png", "--quality", 0.5, "--refine", 60, "--gamma", 0
    )
    assert status == 130 and "stopping with the result so far" in err
    chunk = refinement.preset(60).chunk_steps
    assert f" {chunk} steps" in out and os.path.exists("photo.semlic")
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_ends_a_run_over_several_files(semlic, photo, monkeypatch):
    """Also where all steps of a file were made already."""
    Image.open("photo.png").save("second.png")
    finish = Batch.finish

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return finish(*args)

    monkeypatch.setattr(Batch, "finish", interrupted)
    files = ("photo.png", "second.png", "--out-dir", "out")
    status, out, err = semlic("compress", *files, "--quality", 0.5, *STEPS)
    assert status == 130 and "40 steps" in out
    assert os.listdir("out") == ["photo.semlic"]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--refine", 0, "--gamma", 0), 1, "steps of at least 1"),
        (("--refine", "slow"), 1, "expected a preset"),
        (("--refine", "1.5"), 2, "a preset or a number of steps"),
        (("--refine", 5, "--alpha", -1), 1, "alpha of at least 0"),
        (("--refine", 5, "--method", "magic"), 1, "unknown rounding method"),
        (("--refine", 5, "--seed", 10**30), 1, "expected a seed from 0 to 4294967295"),
        ((*STEPS, "--mean-style", 1), 1, "--gamma above 0 with --mean-style, found 0"),
        ((*STEPS, "--structure", 1), 1, "--gamma above 0 with --structure, found 0"),
        ((*STEPS, "--lattice", 1), 1, "--gamma above 0 with --lattice, found 0"),
        ((*STEPS, "--features", "f"), 1, "--gamma above 0 with --features, found 0"),
        (("--alpha", 1), 1, "--alpha needs --refine"),
        (("--mean-style", 1), 1, "--mean-style needs --refine"),
        (("--lattice", 1), 1, "--lattice needs --refine"),
        (("--roi", "auto"), 1, "--roi needs --refine"),
        ((*STEPS, "--roi", "no.png"), 1, "the mask no.png does not exist"),
        ((*STEPS, "--roi", "1,2,3"), 1, "x,y,width,height"),
        (
            (*STEPS, "--roi-weight", 2, "--roi", "auto"),
            2,
            "expected a number from 0 to 1",
        ),
        ((*STEPS, "--roi-variant", "L3", "--roi", "auto"), 1, "L1"),
        (
            (*STEPS, "--roi", "auto", "--roi-variant", "L2"),
            1,
            "--gamma above 0 with --roi-variant L2, found 0",
        ),
        ((*STEPS, "--max-bytes", 20), 2, "not allowed with"),
    ],
)
def test_refusals(semlic, photo, options, status, words):
    found, out, err = semlic("compress", "photo.png", "--quality", 0.5, *options)
    assert (found, out) == (status, "") and words in err
    assert err.startswith("semlic: ") and err.count("\n") == 1
    assert os.listdir() == ["photo.png"]


def test_masks_of_another_size(semlic, photo):
    Image.new("L", (32, 28), 255).save("mask.png")
    call = ("compress", "photo.png", "--quality", 0.5, *STEPS[:1], 2, *STEPS[2:])
    status, out, err = semlic(*call, "--roi", "mask.png")
    assert status == 1 and "64 x 56" in err and "32 x 28" in err
    status, out, err = semlic(*call, "--roi", "mask.png", "--roi-resize")
    assert status == 0
    assert err == "note: the region covers the whole image: refining without one\n"


# Folders.


@pytest.fixture
def album(tmp_path, monkeypatch, photograph):
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    for name, seed in (("a", 3), ("b", 4), ("c", 5)):
        Image.fromarray(photograph(*SIZE, seed=seed)).save(f"in/{name}.png")
    return tmp_path


BPP = 0.42  # within what the model reaches on these images
REFINE = ("refine", "in", "out", "--bpp", BPP, "--steps", 4, "--gamma", 0)


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def counted(monkeypatch, fail_at=None):
    """Counts the images that are refined; breaks off at one of them."""
    refine, names = refinement.refine_batch, []

    def counting(codec, images, **options):
        names.extend(images)
        if fail_at is not None and len(names) >= fail_at:
            raise KeyboardInterrupt
        return refine(codec, images, **options)

    monkeypatch.setattr(folder_module, "refine_batch", counting)
    return names


def test_a_folder_resumes_after_a_kill(semlic, album, monkeypatch):
    with monkeypatch.context() as patched:
        counted(patched, fail_at=3)
        assert semlic(*REFINE)[0] == 130
    assert sorted(os.listdir("out")) == ["a.semlic", "b.semlic", "refine.csv"]
    before = {name: os.stat(f"out/{name}.semlic").st_mtime_ns for name in "ab"}
    seen = counted(monkeypatch)
    status, out, err = semlic(*REFINE)
    assert (status, err) == (0, "") and len(seen) == 1
    for name, time_ns in before.items():
        assert os.stat(f"out/{name}.semlic").st_mtime_ns == time_ns
    rows = rows_of("out/refine.csv")
    assert [row["image"] for row in rows] == ["a.png", "b.png", "c.png"]
    for row in rows:
        size = os.path.getsize(f"out/{row['file']}")
        assert int(row["bytes"]) == size <= int(row["budget_bytes"])
        assert float(row["bpp"]) <= BPP
        assert float(row["value"]) <= float(row["unrefined_value"])
    assert semlic(*REFINE)[0] == 0 and len(seen) == 1
    # A file that was lost or damaged is made again.
    with open("out/b.semlic", "ab") as stream:
        stream.write(b"?")
    status, _, err = semlic(*REFINE)
    assert status == 1 and "b.semlic was not made from this image" in err
    os.remove("out/b.semlic")
    assert semlic(*REFINE)[0] == 0 and len(seen) == 2


def test_other_settings_do_not_replace_files(semlic, album, monkeypatch):
    assert semlic(*REFINE)[0] == 0
    seen = counted(monkeypatch)
    status, _, err = semlic(*REFINE, "--seed", 5)
    assert status == 1 and "out/a.semlic was not made" in err and not seen
    assert semlic(*REFINE, "--seed", 5, "--force")[0] == 0 and len(seen) == 3


def test_processes_share_a_folder(semlic, album, monkeypatch):
    seen = counted(monkeypatch)
    for process, count in ((0, 2), (1, 3)):
        status, _, _ = semlic(*REFINE, "--processes", 2, "--process", process)
        assert status == 0 and len(seen) == count
    names = [
        row["image"] for i in (0, 1) for row in rows_of(f"out/refine.{i}-of-2.csv")
    ]
    assert names == ["a.png", "c.png", "b.png"]
    # What two have done, one need not do again.
    assert semlic(*REFINE)[0] == 0 and len(seen) == 3
    assert len(rows_of("out/refine.csv")) == 3


def test_images_that_fail_do_not_end_the_run(semlic, album):
    with open("in/b.png", "wb") as stream:
        stream.write(b"no image")
    Image.new("RGB", (8, 8)).save("in/c.png")  # too few pixels for the rate
    status, out, err = semlic(*REFINE)
    assert status == 4 and out.startswith("a.semlic: ")
    assert "skipped b.png: " in err and "skipped c.png: expected a budget" in err


def test_images_without_room_do_not_end_the_run(semlic, album, monkeypatch):
    left = iter([1])
    monkeypatch.setattr(memory, "available_bytes", lambda: next(left, None))
    status, out, err = semlic(*REFINE)
    assert status == 4 and "skipped a.png: not enough memory: refining" in err
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == [
        "b.semlic",
        "c.semlic",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--processes", 2), "--process=0..N-1"),
        (("--process", 0), "--process=0..N-1"),
        (("--steps", 0), "steps of at least 1"),
        (("--distributed", "maybe"), "none, auto or explicit"),
        (("--coordinator", "host:1"), "--coordinator needs --distributed explicit"),
    ],
)
def test_refusals_of_folders(semlic, album, options, words):
    status, out, err = semlic(*REFINE, *options)
    assert (status, out) == (1, "") and words in err and not os.path.exists("out")


def test_names_that_collide_are_refused(semlic, album):
    Image.new("RGB", (64, 56)).save("in/a.bmp")
    status, _, err = semlic(*REFINE)
    assert status == 1 and "a.bmp" in err and "a.png" in err


def test_learning_rates_fall_at_the_end_alone():
    def rates(decay):
        settings = dataclasses.replace(SETTINGS, learning_rate=0.1, decay=decay)
        return settings.learning_rates()

    found = rates(0.3)  # of 40 steps: the last 12
    np.testing.assert_allclose(found[:28], 0.1, rtol=1e-6)
    assert (np.diff(found[27:]) < 0).all() and 0 < found[-1] < 0.001
    assert found[28:].mean() == pytest.approx(0.05, rel=1e-3)
    np.testing.assert_allclose(rates(0.0), 0.1, rtol=1e-6)


def test_first_steps_of_adam_are_of_the_learning_rate():
    """Whatever the gradient's size: its moments start from 0, and this is undone."""
    y, z = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 1, 1, 2))
    state = State((y, z), (y, z), (y, z), jnp.zeros(1))
    gradient = (y + 1e-3, z - 50.0)
    for step in range(3):
        now = Schedule(step, 0.5, 0.01, 0)
        latents, first, second = steps_module._adam(state, gradient, now)
        state = State(latents, first, second, state.log_beta)
        np.testing.assert_allclose(latents[0], -0.01 * (step + 1), rtol=1e-3)
        np.testing.assert_allclose(latents[1], 0.01 * (step + 1), rtol=1e-3)
