"""What notebook 23 defines: its cache and limiters against planted truths, and its page in a real browser."""

import asyncio
import json
import time

import numpy as np
import pytest
from browser import CHROMIUM, browser
from definitions import definitions
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gradio")
SERVICES = definitions("23_services", "definitions", "demo", "serving")


def kept(call, *askers):
    """What the askers, coroutines over the cached call, got one after the other."""

    async def run():
        ask = SERVICES.cached(60, clock=lambda: 0.0)(call)
        return [await asker(ask) for asker in askers]

    return asyncio.run(run())


@given(st.integers(), st.one_of(st.none(), st.lists(st.floats(allow_nan=False)), st.text()))
def test_every_spelling_of_a_call_is_one_call(first, second):
    calls = []

    async def call(first, second=None):
        calls.append((first, second))

    spelled = [
        lambda ask: ask(first, second),
        lambda ask: ask(second=second, first=first),
        lambda ask: ask(first, second=second),
    ]
    kept(call, *spelled)
    assert len(calls) == 1


MIXED = st.sampled_from([0, 1, False, True, 0.0, 1.0, "0", "1"])


@given(st.lists(MIXED, max_size=6))
def test_values_of_other_types_are_other_calls(values):
    async def call(value):
        return type(value), value

    asked = [lambda ask, value=value: ask(value) for value in values]
    assert kept(call, *asked) == [(type(value), value) for value in values]


def test_a_failure_is_not_kept():
    calls = []

    async def call():
        calls.append(1)
        if len(calls) == 1:
            raise OSError("busy")
        return "yes"

    async def try_it(ask):
        try:
            return await ask()
        except OSError:
            return "no"

    assert kept(call, try_it, try_it, try_it) == ["no", "yes", "yes"]


def test_a_cancelled_call_is_asked_again():
    calls = []

    async def call():
        calls.append(1)
        if len(calls) == 1:
            raise asyncio.CancelledError
        return "yes"

    async def try_it(ask):
        try:
            return await ask()
        except asyncio.CancelledError:
            return "no"

    assert kept(call, try_it, try_it, try_it) == ["no", "yes", "yes"]


def test_no_more_is_held_than_fits_and_the_newest_stays():
    async def fill():
        ask = SERVICES.cached(60, clock=lambda: 0.0, size=3)(asyncio.sleep)
        for n in range(10):
            await ask(0, n)
        return [task.result() for task, _ in ask.kept.values()]

    assert asyncio.run(fill()) == [7, 8, 9]


def test_arrays_of_objects_are_no_key():
    """Their bytes are addresses, which are used again."""
    with pytest.raises(TypeError):
        hash(SERVICES.content(np.array([{}, 1], dtype=object)))


@given(st.lists(st.floats(0, 30), min_size=1, max_size=80), st.integers(1, 5), st.integers(1, 30))
def test_limiters_admit_no_more_than_they_promise(gaps, capacity, per_minute):
    bucket, window = SERVICES.Bucket(capacity, per_minute / 60), SERVICES.Window(per_minute, 60)
    times = [sum(gaps[: n + 1]) for n in range(len(gaps))]
    for limiter, most in ((bucket, lambda w: capacity + per_minute * w / 60), (window, lambda w: per_minute)):
        let_in = [now for now in times if limiter.admits(now)]
        for n, start in enumerate(let_in):
            for m, end in enumerate(let_in[n:], start=1):
                if limiter is bucket or end - start < 60:
                    assert m <= most(end - start) + 1e-6


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_the_page_answers_in_a_browser_and_asks_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")

    def answer(text):
        return {f"after {text}": 0.75, "other": 0.25}

    def until(expression):
        limit = time.monotonic() + 60
        while not (found := tab.run(expression)):
            assert time.monotonic() < limit, expression
            time.sleep(0.1)
        return found

    with SERVICES.serving(SERVICES.make_demo(answer)) as place, browser(tmp_path) as tab:
        tab.call("Page.navigate", url=f"http://{place}/demo/")
        until("!!document.querySelector('textarea, input[type=text]')")
        tab.run(
            """(() => { const box = document.querySelector('textarea, input[type=text]');
            const kind = box.tagName === 'TEXTAREA' ? HTMLTextAreaElement : HTMLInputElement;
            Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call(box, 'hello');
            box.dispatchEvent(new Event('input', {bubbles: true})); })()"""
        )
        until("[...document.querySelectorAll('button')].some(b => b.innerText.trim() === 'Submit')")
        tab.run("[...document.querySelectorAll('button')].find(b => b.innerText.trim() === 'Submit').click()")
        shown = until("document.body.innerText.includes('after hello') && document.body.innerText")
        asked = tab.run("performance.getEntriesByType('resource').map(entry => new URL(entry.name).host)")
    assert "75%" in shown and "25%" in shown
    assert set(asked) <= {place, ""}, json.dumps(sorted(set(asked)))
