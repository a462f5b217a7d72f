"""What MLflow's own pages show of a run, texts as traces with scores and ratings; and their server."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers.records import Failure, LabError, Sample, Score
from nbhelpers.redact import printable

if TYPE_CHECKING:
    from mlflow.entities import Trace

EVALUATION = {"mlflow.runType": "genai_evaluate"}  # MLflow's page of evaluations lists such runs
OF_RUN = "mlflow.assessment.sourceRunId"
MOST_TRACES = 100  # of a model: each costs a transaction
PREVIEW = 1000  # characters of a text that a list of traces holds


def log_traces(
    uri: str, experiment: str, run: str, model: str, samples: Sequence[Sample], scores: Mapping[str, Score]
) -> str:
    """Log the first text of each prompt as a trace with its scores, by key; returns a note about them."""
    from mlflow import entities
    from mlflow.tracing.client import TracingClient

    client = TracingClient(uri)
    location = entities.TraceLocation.from_experiment_id(experiment)
    first, spans = dict[str, Sample](), list[entities.Span]()
    for sample in samples:
        first.setdefault(sample.prompt_id, sample)  # MLflow lays one text of a prompt beside another run's
    for sample in [*first.values()][:MOST_TRACES]:
        prompt, text, error = (printable(part or "") for part in (sample.prompt, sample.text, sample.error))
        name, trace_id = printable(sample.prompt_id)[:250], f"tr-{secrets.token_hex(16)}"
        start = time.time_ns()
        end = start + int(1e9 * (sample.latency_s or 0))
        state = "ERROR" if error else "OK"
        info = entities.TraceInfo(trace_id, location, start // 10**6, entities.TraceState[state])
        info.assessments = _assessments(scores.get(sample.key), run)
        info.request_preview, info.response_preview = prompt[:PREVIEW], (error or text)[:PREVIEW]
        info.client_request_id, info.execution_duration = sample.key, (end - start) // 10**6
        info.trace_metadata["mlflow.sourceRun"] = run
        info.tags |= {"mlflow.traceName": name, "mlflow.trace.spansLocation": "TRACKING_STORE"}
        client.start_trace(info)
        tokens = {"input_tokens": sample.prompt_tokens, "output_tokens": sample.new_tokens}
        usage = tokens | {"total_tokens": sum(tokens.values())}
        facts = {"traceRequestId": trace_id, "spanType": "LLM", "llm.model": model, "chat.tokenUsage": usage}
        facts |= {"spanInputs": {"prompt": prompt}, "spanOutputs": text}
        attributes = {f"mlflow.{key}": json.dumps(value) for key, value in facts.items()}
        ids = {"trace_id": trace_id, "span_id": secrets.token_hex(8), "parent_span_id": None}
        times = {"start_time_unix_nano": start, "end_time_unix_nano": end}
        status = {"code": f"STATUS_CODE_{state}", "message": error}
        span = {"name": name, **ids, **times, "status": status, "attributes": attributes}
        spans.append(entities.Span.from_dict(span))
    with suppress(NotImplementedError):  # a server before 3.4 keeps what its lists show
        client.log_spans(experiment, spans)
    return f"Traces: the first text of {len(spans)} prompts. All {len(samples)} texts: samples.json."


def _assessments(score: Score | None, run: str) -> list[Any]:
    """A text's scores, by our code, and the right answer that its task gives."""
    from mlflow.entities import AssessmentSource, Expectation, Feedback

    scorer, author = AssessmentSource("CODE", "nbhelpers"), AssessmentSource("HUMAN", "the task")
    values, origin = score.values if score else {}, {OF_RUN: run}
    assessments: list[Any] = [Feedback(n, v, source=scorer, metadata=origin) for n, v in values.items()]
    if score and score.target:
        assessments.append(Expectation("target", [*map(printable, score.target)], author))
    return assessments


def traces_of(uri: str, experiment: str, run: str) -> list[Trace]:
    """A run's traces with their assessments, without their spans."""
    from mlflow.tracing.client import TracingClient

    query = {"locations": [experiment], "run_id": run, "max_results": MOST_TRACES}
    return list(TracingClient(uri).search_traces(**query, include_spans=False))


def log_ratings(uri: str, experiment: str, run: str, ratings: Mapping[str, Mapping[str, float]]) -> None:
    """Add ratings to a run's traces, each once: "judge MODEL" or a person's name -> sample key -> rating."""
    from mlflow.entities import AssessmentSource, Feedback
    from mlflow.tracing.client import TracingClient

    for trace in traces_of(uri, experiment, run) if ratings else ():
        logged = {(a.source.source_id, a.feedback.value) for a in trace.info.assessments if a.feedback}
        for rater, by_key in ratings.items():
            rating = by_key.get(trace.info.client_request_id or "")
            if rating is not None and (rater, rating) not in logged:
                source = AssessmentSource("LLM_JUDGE" if rater.startswith("judge ") else "HUMAN", rater)
                feedback = Feedback("rating", rating, source=source, metadata={OF_RUN: run})
                TracingClient(uri).log_assessment(trace.info.trace_id, feedback)


def serve_ui(uri: str, outputs: Path, port: int) -> subprocess.Popen[bytes]:
    """MLflow's server of this database on 127.0.0.1, once it answers. LabError for a port that is taken."""
    with socket.socket() as probe:
        if os.name == "posix":  # where a port that was just left would count as taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = f"Port {port} of 127.0.0.1 cannot be used ({error.strerror}): choose another by --port."
            raise LabError(why, Failure.TRACKING) from None
    log = outputs / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", f"{port}"]
    command += ["--workers", "1", "--artifacts-destination", f"{outputs / 'mlartifacts'}"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment["MLFLOW_BACKEND_STORE_URI"] = uri  # may hold a password: not among the arguments
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    while server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return server
        time.sleep(0.2)
    raise LabError(f"MLflow's server ended before it answered: {log} says why.", Failure.TRACKING)
