"""Charts stay within their frame and show every value to scale; maps show every neuron."""

import base64
from io import BytesIO

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from pace_convert.inspect.charts import columns, heat_map, permutation_map
from pace_convert.inspect.tracks import tracks

values = st.lists(
    st.none() | st.floats(-1, 300).filter(lambda x: abs(x) > 0.01 or x == 0),
    min_size=1,
    max_size=90,
)


@given(values, st.floats(-1, 1))
def test_bars_are_to_scale(heights, floor):
    names = [f"layer {i}" for i in range(len(heights))]
    chart = columns(
        "title", "what it is", heights, names, floors={"random": [floor] * len(heights)}
    )
    frame = [(s.x, s.y, s.x + s.width, s.y + s.height) for s in chart.marks]
    assert all(-0.02 <= edge <= 100.02 for shape in frame for edge in shape)
    shown = [value for value in heights if value is not None]
    bars = [shape for shape in chart.marks if shape.kind == "bar"]
    assert len(bars) == len(shown) and 1 <= len(chart.x_ticks) <= 8
    scale = 100 / (
        max(float(label) for _, label in chart.y_ticks)
        - min(float(label) for _, label in chart.y_ticks)
    )
    for bar, value in zip(bars, shown):
        assert abs(bar.height - abs(value) * scale) < 0.02 + 0.01 * abs(value) * scale


@given(st.integers(1, 300), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_map_shows_every_neuron_once(neurons, experts, random):
    experts = min(neurons, experts)
    cuts = sorted(random.sample(range(1, neurons), experts - 1))
    sizes = np.diff([0, *cuts, neurons])
    permutation = np.array(random.sample(range(neurons), neurons), dtype=np.int32)
    counts = permutation_map(permutation, sizes) * sizes[:, None]
    np.testing.assert_allclose(counts.sum(1), sizes)
    np.testing.assert_allclose(
        counts.sum(0), np.bincount(np.arange(neurons) * counts.shape[1] // neurons)
    )


def test_the_larger_the_darker():
    pixels = imread(
        BytesIO(base64.b64decode(heat_map(np.arange(16.0).reshape(2, 8)).partition(",")[2]))
    )
    assert pixels.shape == (2, 8, 4) and pixels[0, 0, 3] == 0 and pixels[1, 7, 3] == 1
    assert (np.diff(pixels[..., 3].ravel()) >= 0).all()


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 12))
def test_tracks_of_texts_of_any_length(tokens, interval, pieces):
    """All tokens mixed once there is a bank; the text's end may be the end of a block."""
    similarity = [None if token < interval else 0.5 for token in range(tokens)]
    mixed = [int(x is not None) for x in similarity]
    blocks = tokens // interval
    memory = {
        "tokens": {
            "kept": [1 - x for x in mixed], "mixed": mixed, "reused": [0] * tokens,
            "similarity": similarity,
        },
        "filled": [2] * blocks, "replaced": 0,
        "slots": [{"slot": 0, "token": 0, "piece": "a", "hits": 3, "merged": 1}] * bool(blocks),
    }  # fmt: skip
    segments = sorted({round(tokens * i / pieces) for i in range(pieces + 1)})
    decisions, similar, filled, origins = tracks(
        memory,
        {
            "theta_low": 0.25,
            "theta_high": 0.75,
            "slots": 4,
            "update_interval": interval,
            "granularity": "expert",
        },
        segments,
    )
    for chart in (decisions, similar, filled, origins):
        assert all(
            -0.02 <= edge <= 100.02
            for s in chart.marks
            for edge in (s.x, s.y, s.x + s.width, s.y + s.height)
        )
    area = {
        kind: sum(s.width * s.height / 1e4 for s in decisions.marks if s.kind == kind)
        for kind in ("mixed", "before", "kept")
    }
    assert abs(area["mixed"] - max(0, tokens - interval) / tokens) < 0.01
    assert len(origins.marks) == bool(blocks) and 1 <= len(origins.x_ticks) <= 7
    assert bool(filled.marks) == (tokens > interval)
