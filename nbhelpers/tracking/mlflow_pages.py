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
MOST = 100  # traces of a model: each costs a transaction
SHOWN = 1000  # characters of a text that a list of traces holds


def log_traces(
    uri: str, experiment: str, run: str, model: str, samples: Sequence[Sample], scores: Mapping[str, Score]
) -> str:
    """Log the first text of each prompt as a trace with its scores, by key; and say which that are.

    One text of a prompt is what MLflow lays beside that of another run.
    """
    from mlflow import entities
    from mlflow.tracing.client import TracingClient

    client, place = TracingClient(uri), entities.TraceLocation.from_experiment_id(experiment)
    by_code = entities.AssessmentSource("CODE", "nbhelpers")
    by_hand = entities.AssessmentSource("HUMAN", "the task")
    first, spans = dict[str, Sample](), list[entities.Span]()
    for sample in samples:
        first.setdefault(sample.prompt_id, sample)
    for sample in [*first.values()][:MOST]:
        score, id, start = scores.get(sample.key), f"tr-{secrets.token_hex(16)}", time.time_ns()
        end, name = start + int(1e9 * (sample.latency_s or 0)), printable(sample.prompt_id)[:250]
        asked, text, error = (printable(said or "") for said in (sample.prompt, sample.text, sample.error))
        known: list[Any] = [
            entities.Feedback(part, value, source=by_code, metadata={OF_RUN: run})
            for part, value in (score.values if score else {}).items()
        ]
        if score and score.target:
            known.append(entities.Expectation("target", [*map(printable, score.target)], by_hand))
        state = entities.TraceState.ERROR if error else entities.TraceState.OK
        info = entities.TraceInfo(id, place, start // 10**6, state, assessments=known)
        info.request_preview, info.response_preview = asked[:SHOWN], (error or text)[:SHOWN]
        info.client_request_id, info.execution_duration = sample.key, (end - start) // 10**6
        info.trace_metadata["mlflow.sourceRun"] = run
        info.tags |= {"mlflow.traceName": name, "mlflow.trace.spansLocation": "TRACKING_STORE"}
        client.start_trace(info)
        tokens = {"input_tokens": sample.prompt_tokens, "output_tokens": sample.new_tokens}
        said = {"traceRequestId": id, "spanType": "LLM", "spanInputs": {"prompt": asked}, "spanOutputs": text}
        said |= {"llm.model": model, "chat.tokenUsage": tokens | {"total_tokens": sum(tokens.values())}}
        row: dict[str, Any] = {"trace_id": id, "span_id": secrets.token_hex(8), "parent_span_id": None}
        row |= {"name": name, "start_time_unix_nano": start, "end_time_unix_nano": end}
        row["status"] = {"code": f"STATUS_CODE_{'ERROR' if error else 'OK'}", "message": error}
        row["attributes"] = {f"mlflow.{key}": json.dumps(value) for key, value in said.items()}
        spans.append(entities.Span.from_dict(row))
    with suppress(NotImplementedError):  # a server before 3.4 keeps what its lists show
        client.log_spans(experiment, spans)
    return f"Traces: the first text of {len(spans)} prompts. All {len(samples)} texts: samples.json."


def traces_of(uri: str, experiment: str, run: str) -> list[Trace]:
    """A run's traces with their assessments, without their spans."""
    from mlflow.tracing.client import TracingClient

    asked = {"locations": [experiment], "run_id": run, "max_results": MOST}
    return list(TracingClient(uri).search_traces(**asked, include_spans=False))


def log_ratings(uri: str, experiment: str, run: str, given: Mapping[str, Mapping[str, float]]) -> None:
    """Add ratings to a run's traces; one that is there stays one.

    given: "judge MODEL", or whatever people are called -> sample key -> rating.
    """
    from mlflow.entities import AssessmentSource, Feedback
    from mlflow.tracing.client import TracingClient

    for trace in traces_of(uri, experiment, run) if given else ():
        known = {(a.source.source_id, a.feedback.value) for a in trace.info.assessments if a.feedback}
        for who, by in given.items():
            rating = by.get(trace.info.client_request_id or "")
            if rating is not None and (who, rating) not in known:
                source = AssessmentSource("LLM_JUDGE" if who.startswith("judge ") else "HUMAN", who)
                rated = Feedback("rating", rating, source=source, metadata={OF_RUN: run})
                TracingClient(uri).log_assessment(trace.info.trace_id, rated)


def serve_ui(uri: str, outputs: Path, port: int) -> subprocess.Popen[bytes]:
    """MLflow's server of this database on 127.0.0.1, once it answers. LabError for a port that is taken."""
    with socket.socket() as free:
        if os.name == "posix":  # there a port that was just left counts as taken without
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", port))
        except OSError as error:
            why = f"Port {port} of 127.0.0.1 cannot be used ({error.strerror}): choose another by --port."
            raise LabError(why, Failure.TRACKING) from None
    log = outputs / "mlflow.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", f"{port}"]
    command += ["--workers", "1", "--artifacts-destination", f"{outputs / 'mlartifacts'}"]
    own = os.environ | {"MLFLOW_BACKEND_STORE_URI": uri}  # may hold a password: not among the arguments
    own["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with log.open("wb") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=own, start_new_session=True)
    while server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return server
        time.sleep(0.2)
    raise LabError(f"MLflow's server ended before it answered: {log} says why.", Failure.TRACKING)
