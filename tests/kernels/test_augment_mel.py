"""augment_mel against its formula in float64, and against log_mel for views that only crop."""

import math
from dataclasses import replace

import pytest
import torch
from log_mel_cases import clips, quiet_about_empty_bands  # noqa: F401
from oracle import DEVICE, DTYPES, IMPLS, needs_kernel, poison  # noqa: F401

from ajepa_kernels import LogMelSpec, MelViews, augment_mel, augment_mel_reference, log_mel

LN = LogMelSpec(mean=-4.0, std=4.5)
DB = LogMelSpec(convention="torchaudio", log="db", mean=-30.0, std=20.0)


def at(views: MelViews) -> MelViews:
    return MelViews(*(x.to(DEVICE) for x in views))


def draw(R: int, B: int, L: int, K: int) -> MelViews:
    """Views of every kind: they start before and after the clip, shift the bands beyond both ends, and half of them
    have no background."""
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape)  # noqa: E731
    gain = uniform(0.1, 2, R, 2)
    gain[::2, 1] = 0
    return MelViews(
        clip=torch.randint(B, (R, 2), dtype=torch.int32),
        start=uniform(-2.5 * L, 2.5 * L, R, 2),
        rate=uniform(0.6, 1.6, R),
        band=torch.stack((uniform(-3, 3, R), uniform(0.7, 1.4, R)), 1),
        gain=gain,
        equaliser=uniform(-8, 8, R, K),
    )


def power(B: int, M: int, L: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mel power and lengths. What lies beyond a clip's end is NaN, so that reading it fails."""
    mel, lengths = torch.randn(B, M, L).exp(), torch.randint(1, L + 1, (B,), dtype=torch.int32)
    return mel.masked_fill((torch.arange(L) >= lengths[:, None])[:, None], torch.nan), lengths


def oracle(mel, views, spec, lengths=None):
    """The patches by the formula, in float64, view by view."""
    (M, L), (height, width), T = mel.shape[1:], spec.patch, spec.n_frames
    views, out = [x.double() for x in views], []
    for clip, start, rate, band, gain, equaliser in zip(*views, strict=True):
        position = (band[0] + band[1] * torch.arange(M, dtype=torch.float64)).clamp(0, M - 1)
        value = torch.zeros(M, T, dtype=torch.float64)
        for i in range(2):
            if gain[i] == 0:
                continue
            n = L if lengths is None else int(lengths[int(clip[i])])
            x = mel[int(clip[i]), :, :n].double()
            x = torch.cat((x, x[:, :1]), 1)  # after the last frame comes frame 0
            frame = (start[i] + rate * torch.arange(T, dtype=torch.float64)) % n
            left, low = frame.floor().long().clamp_max(n - 1), position.floor().long()
            x = x[:, left] + (x[:, left + 1] - x[:, left]) * (frame - left)
            value += gain[i] * (x[low] + (x[(low + 1).clamp_max(M - 1)] - x[low]) * (position - low)[:, None])
        knots = torch.linspace(0, M - 1, len(equaliser), dtype=torch.float64)
        for m in range(M):
            k = int((knots <= m + 1e-9).sum()) - 1 if M > 1 else 0
            decibel = equaliser[k]
            if m < M - 1 and k + 1 < len(equaliser):
                decibel = decibel + (equaliser[k + 1] - decibel) * (m - knots[k]) / (knots[k + 1] - knots[k])
            value[m] *= 10 ** (decibel / 10)
        log = value.clamp_min(spec.log_floor).log()
        if spec.log == "db":
            log *= (10 if spec.power == 2 else 20) / math.log(10)
        log = torch.nn.functional.pad(log, (0, -T % width))
        log = (log - spec.mean) / spec.std
        out += [log[f : f + height, t : t + width].flatten() for f in range(0, M, height) for t in range(0, T, width)]
    return torch.stack(out).view(len(views[0]), -1, height * width) if out else mel.new_zeros(0).double()


# Shapes: a part of a tile, a single band, patches that the frames do not fill, several tiles in both directions, a
# clip of one frame.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("R", "B", "M", "L", "T", "patch", "K"),
    [
        (6, 3, 16, 40, 20, (8, 8), 5), (3, 2, 7, 9, 5, (7, 3), 1), (2, 2, 1, 3, 4, (1, 5), 3),
        (3, 4, 80, 70, 150, (16, 16), 2), (4, 2, 36, 1, 33, (12, 4), 7),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "change", [LN, DB, replace(DB, power=1), replace(LN, floor=1.0)], ids=["ln", "db", "magnitude", "floor"]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_value(R, B, M, L, T, patch, K, change, impl):
    spec = replace(change, n_mels=M, n_frames=T, patch=patch)
    views, (mel, lengths) = draw(R, B, L, K), power(B, M, L)
    got = augment_mel(mel.to(DEVICE), at(views), spec, lengths=lengths.to(DEVICE), impl=impl)
    # positions have float32's rounding, which is a share of a frame's difference from its neighbour
    torch.testing.assert_close(got.cpu().double(), oracle(mel, views, spec, lengths), rtol=1e-5, atol=1e-4)
    mel = mel.nan_to_num(0.5)
    got = augment_mel(mel.to(DEVICE), at(views), spec, impl=impl)
    torch.testing.assert_close(got.cpu().double(), oracle(mel, views, spec), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes(dtype, impl):
    spec = replace(LN, n_mels=16, n_frames=20, patch=(4, 6))
    views, (mel, lengths) = at(draw(5, 3, 40, 4)), power(3, 16, 40)
    arguments = (mel.to(DEVICE), views, spec)
    got = augment_mel(*arguments, lengths=lengths.to(DEVICE), dtype=dtype, impl=impl)
    want = augment_mel(*arguments, lengths=lengths.to(DEVICE), impl=impl)
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def crops(starts: list[float], M: int, K: int = 3) -> MelViews:
    """Views of clip 0, 1, ... that only crop."""
    R = len(starts)
    pairs = lambda a, b: torch.tensor([[a, b]]).repeat(R, 1)  # noqa: E731
    return at(
        MelViews(
            torch.stack((torch.arange(R), torch.zeros(R).long()), 1).int(), torch.tensor([starts, [0.0] * R]).T,
            torch.ones(R), pairs(0.0, 1.0), pairs(1.0, 0.0), torch.zeros(R, K),
        )
    )  # fmt: skip


@pytest.mark.parametrize("change", [LN, DB], ids=["ln", "db"])
@pytest.mark.parametrize("impl", IMPLS)
def test_crops_are_log_mel(change, impl):
    """A view that only crops holds log_mel's values of that section; from frame 0, all of log_mel's patches."""
    spec = replace(change, n_mels=40, f_min=100.0, n_frames=22, patch=(8, 5))
    pcm = clips(8000, batch=3).to(DEVICE)
    mel = log_mel(pcm, replace(spec, n_frames=None), layout="mel")
    got = augment_mel(mel, crops([0.0] * 3, 40), spec, impl=impl)
    torch.testing.assert_close(got, log_mel(pcm, spec), rtol=1e-6, atol=2e-6)
    section = log_mel(pcm[:, 7 * spec.hop_length :], spec)  # kaldi's frames are those of the shorter clip
    if change is LN:
        torch.testing.assert_close(augment_mel(mel, crops([7.0] * 3, 40), spec, impl=impl), section, rtol=0, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_background_of_gain_0_is_not_read(impl):
    spec = replace(LN, n_mels=8, n_frames=12, patch=(4, 4))
    views, mel = draw(2, 2, 30, 2), torch.rand(2, 8, 30)
    views.clip.copy_(torch.tensor([[0, 1], [0, 1]]))
    want = augment_mel(mel.to(DEVICE), at(views), spec, impl=impl)
    mel[1], views.start[0, 1] = torch.nan, torch.nan
    got = augment_mel(mel.to(DEVICE), at(views), spec, impl=impl)
    assert torch.equal(got[0], want[0]) and got[1].isnan().all()  # the second view has a background


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_floored(impl):
    spec = replace(LN, n_mels=8, n_frames=8, patch=(8, 8))
    mel = torch.rand(1, 8, 20)
    mel[0, 3, 5] = torch.nan
    got = augment_mel(mel.to(DEVICE), crops([0.0], 8), spec, impl=impl).view(8, 8)
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[2:4, 4:6] = True  # also where its weight is 0
    assert torch.equal(got.isnan().cpu(), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_views(impl):
    spec = replace(LN, n_mels=8, n_frames=9, patch=(4, 4))
    views = MelViews(*(x[:0] for x in draw(2, 2, 30, 2)))
    got = augment_mel(torch.rand(2, 8, 30, device=DEVICE), at(views), spec, dtype=torch.float16, impl=impl)
    assert got.shape == (0, 6, 16) and got.dtype == torch.float16


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_int64(impl):
    spec = replace(LN, n_mels=8, n_frames=12, patch=(4, 4))
    views, (mel, lengths) = at(draw(5, 3, 30, 4)), power(3, 8, 30)
    mel, lengths = mel.to(DEVICE), lengths.to(DEVICE)
    want = augment_mel(mel, views, spec, lengths=lengths, impl=impl)
    views = MelViews(*(torch.stack((x, x), -1)[..., 0] for x in views))._replace(clip=views.clip.long())
    mel = mel.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(augment_mel(mel, views, spec, lengths=lengths.long(), impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    spec = replace(DB, n_mels=8, n_frames=10, patch=(4, 4))
    views, (mel, lengths) = at(draw(5, 3, 30, 4)), power(3, 8, 30)
    mel, lengths = mel.to(DEVICE), lengths.to(DEVICE)
    function = lambda mel, views: 3 * augment_mel(mel, views, spec, lengths=lengths, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (5, 3):  # the number of views may change
        part = MelViews(*(x[:n] for x in views))
        torch.testing.assert_close(compiled(mel, part), function(mel, part))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_for_several_specs(impl):
    """The spec may be an argument of the compiled function; fields that change between calls become symbols."""
    views, mel = at(draw(5, 3, 30, 4)), torch.rand(3, 8, 30, device=DEVICE)
    function = lambda mel, views, spec: augment_mel(mel, views, spec, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for change in ({}, {"n_frames": 17}, {"std": 3.0}, {"n_frames": 9, "floor": 1e-3}, {"patch": (2, 3)}):
        spec = replace(LN, **{"n_mels": 8, "n_frames": 10, "patch": (4, 4)} | change)
        torch.testing.assert_close(compiled(mel, views, spec), function(mel, views, spec))


@pytest.mark.parametrize("impl", IMPLS)
def test_ignores_autocast(impl):
    spec = replace(DB, n_mels=8, n_frames=10, patch=(4, 4))
    views, mel = at(draw(5, 3, 30, 4)), torch.rand(3, 8, 30, device=DEVICE)
    want = augment_mel(mel, views, spec, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(augment_mel(mel, views, spec, impl=impl), want)


def of_op(mel, views, lengths, dtype=torch.float32):
    return mel, lengths, *views, (4, 4), 10, 1e-7, 0.5, 2.0, dtype


@needs_kernel
def test_opcheck():
    views, (mel, lengths) = at(draw(5, 3, 30, 4)), power(3, 8, 30)
    for arguments in ((mel.to(DEVICE), views, lengths.to(DEVICE)), (torch.rand(3, 8, 30, device=DEVICE), views, None)):
        torch.library.opcheck(torch.ops.ajepa.augment_mel_fwd.default, of_op(*arguments))


@needs_kernel
def test_the_kernel_stays_inside_the_clips():
    """Clips and lengths out of range are clamped, and positions that are no number read some frame of the clip."""
    views, mel = at(draw(5, 3, 30, 4)), torch.rand(3, 8, 30, device=DEVICE)
    run = lambda views, lengths: torch.ops.ajepa.augment_mel_fwd(*of_op(mel, views, lengths))  # noqa: E731
    wild, tame = views.clip.clone(), views.clip.clone()
    wild[0], wild[1], tame[0], tame[1] = 99, -5, 2, 0
    got = run(views._replace(clip=wild), torch.tensor([-3, 30, 77], device=DEVICE))
    want = run(views._replace(clip=tame), torch.tensor([1, 30, 30], device=DEVICE))
    assert torch.equal(got, want)
    start = views.start.clone()
    start[0], start[1], start[2] = torch.nan, torch.inf, 1e30
    got, want = run(views._replace(start=start), None), run(views, None)
    assert torch.equal(got[3:], want[3:])


def test_float64():
    spec = replace(LN, n_mels=16, n_frames=20, patch=(4, 6))
    views, (mel, lengths) = draw(5, 3, 40, 4), power(3, 16, 40)
    want = oracle(mel, views, spec, lengths)
    for got in (
        augment_mel_reference(mel.double(), views, spec, lengths=lengths),
        augment_mel(mel, views, spec, lengths=lengths, dtype=torch.float64),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"mel": torch.ones(8, 30)}, ValueError, r"mel must be \[B, 8, L\]"),
        ({"mel": torch.ones(2, 9, 30)}, ValueError, r"mel must be \[B, 8, L\]"),
        ({"mel": torch.ones(0, 8, 30)}, ValueError, "B, L >= 1"),
        ({"mel": torch.ones(2, 8, 30).half()}, TypeError, "mel must be float32"),
        ({"mel": torch.ones(2, 8, 30, requires_grad=True)}, ValueError, "no gradient"),
        ({"dtype": torch.int16}, TypeError, "dtype must be"),
        ({"impl": "fused"}, ValueError, "impl must be"),
        ({"spec": {"n_frames": None}}, ValueError, "n_frames must be set"),
        ({"spec": {"log": "db", "top_db": 80.0}}, ValueError, "top_db must be None"),
        ({"spec": {"patch": (3, 4)}}, ValueError, "patch height"),
        ({"lengths": torch.ones(3, dtype=torch.int32)}, ValueError, r"lengths must be int32 or int64 \[2\]"),
        ({"lengths": torch.ones(2)}, ValueError, "lengths must be int32"),
        ({"lengths": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "lengths are on meta"),
        ({"lengths": torch.tensor([30, 0])}, ValueError, r"lengths must be 1\.\.30, got 0\.\.30"),
        ({"lengths": torch.tensor([31, 3])}, ValueError, r"lengths must be 1\.\.30, got 3\.\.31"),
        ({"views": {"clip": torch.ones(5, 2)}}, ValueError, r"views.clip must be int32 \[5, 2\]"),
        ({"views": {"clip": torch.full((5, 2), 2)}}, ValueError, r"views.clip must be 0\.\.1, got 2\.\.2"),
        ({"views": {"start": torch.ones(5)}}, ValueError, r"views.start must be float32 \[5, 2\]"),
        ({"views": {"rate": torch.ones(())}}, ValueError, "views.clip must be"),
        ({"views": {"band": torch.ones(4, 2)}}, ValueError, r"views.band must be float32 \[5, 2\]"),
        ({"views": {"gain": torch.ones(5, 2).double()}}, ValueError, "views.gain must be float32"),
        ({"views": {"gain": torch.ones(5, 2, requires_grad=True)}}, ValueError, "no gradient"),
        ({"views": {"equaliser": torch.ones(5, 0)}}, ValueError, r"views.equaliser must be float32 \[5, 1\]"),
        ({"views": {"equaliser": torch.ones(5)}}, ValueError, "views.equaliser must be"),
        ({"views": {"band": torch.ones(5, 2, device="meta")}}, ValueError, "views.band is on meta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", IMPLS)
def test_errors(change, error, match, impl):
    spec = replace(LN, n_mels=8, n_frames=10, patch=(4, 4))
    arguments = {"mel": torch.ones(2, 8, 30), "views": draw(5, 2, 30, 4), "spec": spec, "impl": impl}
    arguments |= {
        name: {"spec": lambda x: replace(spec, **x), "views": lambda x: arguments["views"]._replace(**x)}[name](x)
        if isinstance(x, dict)
        else x
        for name, x in change.items()
    }
    with pytest.raises(error, match=match):
        augment_mel(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_graph_and_repeats():
    """A captured graph follows the values of the views, and has the bits of a call without a graph."""
    spec = replace(LN, n_mels=128, n_frames=256)
    mel, first, second = torch.rand(64, 128, 400).cuda(), at(draw(128, 64, 400, 5)), at(draw(128, 64, 400, 5))
    held = MelViews(*(x.clone() for x in first))
    augment_mel(mel, held, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = augment_mel(mel, held, spec)
    for views in (first, second):
        for to, x in zip(held, views, strict=True):
            to.copy_(x)
        graph.replay()
        assert torch.equal(out, augment_mel(mel, views, spec))
        torch.testing.assert_close(out, augment_mel(mel, views, spec, impl="reference"), rtol=1e-5, atol=1e-3)
