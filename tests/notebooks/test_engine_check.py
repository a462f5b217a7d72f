"""The engine check of notebook 03_server: planted engines are found, right ones are not accused."""

import random
from dataclasses import replace

import openai_server
import pytest
from definitions import definitions

from nbhelpers import registry
from nbhelpers.generation import generate, server
from nbhelpers.records import Settings

CHECK = definitions("03_server", "definitions").engine_check
ACCUSED = "depends on its company"


def engine(rng, alone=0.0, company=0.0, prompts=15):
    """Answers that change by chance: each with the one probability alone, with the other in company."""

    def answer(at_once):
        chance = alone if at_once == 1 else company
        return [f"text {n}" + f" {rng.random()}" * (rng.random() < chance) for n in range(prompts)]

    return answer


def test_a_hundred_engines_that_depend_on_company_are_found():
    for seed in range(100):
        rng = random.Random(seed)
        _, (share, low, high), verdict = CHECK(engine(rng, company=rng.uniform(0.6, 1.0)))
        assert verdict == ACCUSED, seed
        assert 0 < low < share <= high


def test_a_hundred_right_engines_are_not_accused():
    for seed in range(100):
        *shares, verdict = CHECK(engine(random.Random(seed)))
        assert verdict == "no sign of it"
        assert [share[:2] for share in shares] == [(0, 0)] * 2 and shares[1][2] == pytest.approx(
            0.204, abs=1e-3
        )


def test_engines_that_change_alone_as_well_are_accused_as_seldom_as_the_test_allows():
    accused = 0
    for seed in range(300):
        rng = random.Random(seed)
        chance = rng.uniform(0.05, 0.9)
        accused += CHECK(engine(rng, alone=chance, company=chance))[-1] == ACCUSED
    assert accused <= 3  # SURE is 1%


def test_a_few_changes_are_no_verdict():
    few = lambda at_once: [f"text {n}" + "!" * (at_once > 1 and n < 6) for n in range(15)]  # noqa: E731
    assert CHECK(few)[-1] == "cannot tell"


@pytest.mark.parametrize(("mixes", "verdict"), [(True, ACCUSED), (False, "no sign of it")])
def test_a_real_server_that_mixes_requests_is_found(mixes, verdict):
    prompts, settings = registry.load_prompts(), Settings(repeats=1, temperature=0.0, max_new_tokens=4)

    def answer(prompt, seed):
        return [f" {word}" for word in prompt.split()] if not mixes or served.alive < 2 else [" mixed", " up"]

    with openai_server.serve(answer=answer, first_s=0.02) as served:
        model = server.connect(registry.resolve(f"server:{served.url}#tiny"))

        def texts(at_once):
            rows = generate.generate_samples(model, prompts, replace(settings), batch_size=at_once)
            assert not any(row.error for row in rows)
            return [row.text for row in rows]

        assert CHECK(texts)[-1] == verdict
