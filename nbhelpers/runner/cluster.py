"""The models of a run, spread over a Ray cluster: the notebooks of each up to 05 run on one of its nodes.

Where nodes would be idle, several make the rows of a large model, a part each; its notebook 03 finds them.
Ray schedules, keeps the resources apart and starts again elsewhere what a lost node ran. No disk is shared:
a node sends what it makes to an inbox on the head node, from where this machine collects it and a second
node goes on. MLflow (06) and the comparison stay on this machine, with their addresses and passwords.
"""

import logging
import os
import platform
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from nbhelpers import pipeline, registry, store, tasks
from nbhelpers.devices import fit
from nbhelpers.loading import load
from nbhelpers.phases import NOTEBOOKS, Phase, pipeline_of
from nbhelpers.records import SHORT_DTYPES, Failure, LabError, ModelRun, NotebookStatus, RunInfo, Sample
from nbhelpers.runner import kernels, notebook
from nbhelpers.runner.plan import Plan
from nbhelpers.runner.run import GRACE_S, Run

MODEL_FILES = "[!.]*"  # of a model's folder, without locks
ROWS = "samples.jsonl"  # only grows: its new lines are sent as they come, other files when a notebook ends
POLL_S = 1.0  # between two looks for new rows, and at the inbox
HEAD = "node:__internal_head__"  # Ray's name of a resource that only the head node has
# New tokens times parameters for which one more node pays: about half a minute of a core or a card, where
# starting and loading take a quarter.
LEAST_WORK = {"GPU": 10**15, "CPU": 10**12}

Files = dict[str, bytes]
Output = tuple[Files, list[NotebookStatus]]  # of a model
News = tuple[str, str, str, Output]  # of which model and task; the node that begins with it, or ""; what came


class Inbox:
    """An actor: the output of the models under way, and the news of it that was not collected yet."""

    def __init__(self) -> None:
        self.output, self.news = dict[str, Output](), list[News]()

    def begin(self, model: str, task: str, node: str, earlier: Output) -> Output:
        """A node starts on a task of a model: what is there, from earlier or from other nodes."""
        self.news.append((model, task, node, ({}, [])))
        return self.output.setdefault(model, earlier)

    def put(self, model: str, files: Files, statuses: list[NotebookStatus]) -> None:
        old, all_statuses = self.output[model]
        old |= {name: old.get(name, b"") + data if name == ROWS else data for name, data in files.items()}
        all_statuses += statuses
        self.news.append((model, "", "", (files, statuses)))

    def collect(self, done: list[str]) -> list[News]:
        """The news; models that are done are forgotten."""
        self.output = {model: output for model, output in self.output.items() if model not in done}
        news, self.news = self.news, []
        return news


def join_cluster(address: str) -> Callable[[Run], None]:
    """What ``run_models`` does first, for --cluster. LabError without Ray and where no cluster answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    notebook.engine()  # imports jsonschema, as Ray does, without a grammar that takes a second
    try:
        import ray
    except ImportError:
        raise LabError("The option --cluster needs Ray: install nbhelpers[cluster] here and there.") from None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if address != "auto":  # Ray would wait for it for half a minute
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:300]
        hint = "start one with `ray start --head`, or give ray://HOST:10001 from outside of it"
        raise LabError(f"No Ray cluster can be used at {address} ({first}): {hint}.") from None
    return partial(spread, ray, int(os.environ.get("OMP_NUM_THREADS") or 1))


def spread(ray: Any, cores: int, runner: Run) -> None:
    """Have the cluster run the notebooks up to 05 of the run's models; what follows is run here meanwhile.

    A model behind a server stays here. cores: of each model. LabError where the cluster is lost.
    """
    if runner.info.looks:
        raise LabError("The option --until-decided takes all models at once: leave out --cluster.")
    settings = replace(runner.info.settings, run_dir=str(runner.folder))
    runs = {run.folder.name: run for run in runner.runs(settings)}
    finish = partial(_finish, runner, ThreadPoolExecutor(runner.jobs))
    try:
        inbox = ray.remote(Inbox).options(num_cpus=0, resources={HEAD: 0.001}).remote()
        resources, begun = dict[str, dict[str, Any]](), dict[tuple[str, str], str]()
        for slug, run in runs.items():
            if run.spec.kind == "server" or not _missing(run, runner.info.notebooks):
                finish(run)
            else:
                resources[slug] = needs(run, cores, "GPU" in ray.cluster_resources())
        works = dict[str, list[Any]]()  # of a model: the task of its notebooks, then those it waits for
        nodes = _nodes(ray)
        for slug, need in resources.items():
            model, spec = runs[slug].settings.model, runs[slug].spec
            info = replace(runner.info, models=(model,), specs=(spec,), notebooks=())
            statuses = [status for status in runner.info.notebooks if status.model == model]
            files = {path.name: path.read_bytes() for path in runs[slug].folder.glob(MODEL_FILES)}
            task = partial(ray.remote(work).options(**need).remote, inbox, info, str(runner.folder))
            shares = parts(runs[slug], need, room(nodes, need) // len(resources))
            # The first notebooks choose the dtype, which decides a text: all nodes must have the same.
            first = [task((files, statuses), Phase.ANSWERS)] if shares else []
            first += [task((files, statuses), part, *first) for part in shares]
            works[slug] = [task((files, statuses), Phase.TRACKING, *first), *first]
        while works:
            last = {refs[0]: slug for slug, refs in works.items()}
            done, _ = ray.wait([*last], num_returns=len(last), timeout=POLL_S)
            ended = [last[ref] for ref in done]
            for slug, of_task, node, output in ray.get(inbox.collect.remote(ended)):
                _take(runner, runs[slug], node, output, begun.get((slug, of_task), ""))
                begun |= {(slug, of_task): node} if node else {}
            nodes = _nodes(ray)
            for slug, refs in [*works.items()]:
                if runner.refused and slug not in ended:
                    for ref in refs:
                        ray.cancel(ref, force=True)  # it ends, and the runner says why
                elif slug in ended or not room(nodes, resources[slug]):
                    finish(runs[slug], _problem(ray, works.pop(slug)))
        for future in runner.futures:
            future.result()
    except ray.exceptions.RayError as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LabError(f"The Ray cluster was lost ({why}): continue with --resume {runner.folder}.") from None
    finally:
        ray.shutdown()


def needs(run: ModelRun, cores: int, gpus: bool) -> dict[str, Any]:
    """What a model takes of a node, in Ray's words: memory for its weights where no GPU has them."""
    device, dtype = run.settings.device, run.settings.dtype
    if device not in ("cpu", "auto") or (gpus and device == "auto"):
        return {"num_cpus": cores, "num_gpus": 1}
    dtype = "float32" if dtype == "auto" else SHORT_DTYPES.get(dtype, dtype)
    return {"num_cpus": cores, "memory": int(fit.generation_need(run.spec, dtype).total / fit.HEADROOM)}


def _nodes(ray: Any) -> list[dict[str, float]]:
    """What each node that is there has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(nodes: Iterable[dict[str, float]], need: dict[str, Any]) -> int:
    """How many tasks with this need the nodes hold at a time."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    some = [(names.get(name, name), amount) for name, amount in need.items() if amount]
    return sum(int(min(node.get(name, 0) // amount for name, amount in some)) for node in nodes)


def parts(run: ModelRun, need: dict[str, Any], at_once: int) -> list[slice]:
    """The rows of a large model, whole prompts together, for so many nodes at most; none where one does."""
    prompts, repeats = len(tasks.prompts_of(run.settings)), run.settings.repeats
    made = {row.key for row in store.read_rows(run.folder / ROWS, Sample) if row.error is None}
    passes = (prompts * repeats - len(made)) * run.settings.max_new_tokens  # of one row each
    work = passes * (run.spec.parameters or 0)
    count = min(at_once, prompts, work // LEAST_WORK["GPU" if "num_gpus" in need else "CPU"])
    ends = [prompts * number // count * repeats for number in range(count + 1)] if count > 1 else []
    return [slice(*pair) for pair in pairwise(ends)]


def _missing(run: ModelRun, statuses: Iterable[NotebookStatus]) -> list[str]:
    """The notebooks that a node is to run, in order."""
    done = {status.notebook for status in statuses if status.model == run.settings.model}
    names = pipeline_of(run.spec, run.settings.task)
    return [name for name in names if NOTEBOOKS[name] < Phase.TRACKING and name not in done]


def _take(runner: Run, run: ModelRun, node: str, output: Output, lost: str) -> None:
    """Write a node's output into the run's folder; ``node``: its name as it begins, then ""; lost: whose work
    it then goes on with."""
    (files, statuses), nodes = output, runner.info.nodes
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if name == ROWS:
            with (run.folder / name).open("ab") as out:
                out.write(data)
        else:
            store.write_text(run.folder / name, [data.decode("utf-8", "replace")])
    if node:
        others = [name for name in nodes.get(run.settings.model, node).split(", ") if name != node]
        nodes = nodes | {run.settings.model: ", ".join([*others, node])}
        if lost:
            print(f"{run.spec.alias}: {lost} was lost, {node} goes on with it", file=sys.stderr)
    runner.save(*statuses, nodes=nodes)


def _problem(ray: Any, refs: list[Any]) -> LabError | None:
    """Why a model's last task, the first of these, has not done its work."""
    try:
        ray.get(refs[0], timeout=0)
    except ray.exceptions.GetTimeoutError:
        for ref in refs:
            ray.cancel(ref)
        return LabError("No node of the cluster has the cores, memory or GPU that this model needs.")
    except ray.exceptions.TaskCancelledError:
        return None
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, LabError):
            return cause
        first = f"{type(cause).__name__}: {cause}".splitlines()[0]
        return LabError(f"The cluster could not run it ({first}).", Failure.OTHER)
    return None


def _finish(runner: Run, pool: ThreadPoolExecutor, run: ModelRun, problem: LabError | None = None) -> None:
    """Have the rest of a model's notebooks run here. The commit that a node took from the Hub is kept."""
    if problem and (missing := _missing(run, runner.info.notebooks)):
        error, model = str(problem), run.settings.model
        runner.save(NotebookStatus(missing[0], model, "failed", 0.0, error, problem.kind))
    if run.spec.kind == "hub" and (run.folder / "loading.json").exists():
        fetched = replace(run.spec, revision=load.read_report(run).revision)
        runner.save(specs=tuple(fetched if spec == run.spec else spec for spec in runner.info.specs))
    runner.futures.append(pool.submit(runner.pipeline, run))


def work(inbox: Any, info: RunInfo, home: str, earlier: Output, what: Phase | slice, *_: Any) -> None:
    """On a node: the notebooks of ``info``'s one model still to run before a phase, or a part of its rows.

    home: the run's folder over there; the rest: what Ray ends before. A part that fails is left to whoever
    runs the notebooks. LabError for a model's folder, a task or prompts that this node does not have.
    """
    import ray

    [spec], ended, lock = info.specs, threading.Event(), threading.Lock()
    node = f"{platform.node()} ({ray.util.get_node_ip_address()})"
    paths = [registry.folder_of(spec), Path(info.settings.task), Path(info.settings.prompts)]
    for path in (path for path in paths if path and path.is_absolute() and not path.exists()):
        raise LabError(f"The node {node} has no {path}: copy it there, to the same place.")
    threads = str(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
    with kernels.environment(threads), tempfile.TemporaryDirectory() as scratch:
        # Not by ray.get: while a task waits in it, its node takes on another model.
        files, statuses = inbox.begin.remote(spec.slug, str(what), node, earlier).future().result()
        folder, sent = Path(scratch, spec.slug), {ROWS: b""} | files
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)

        def send(status: NotebookStatus | None = None, names: str = MODEL_FILES) -> None:
            with lock:
                local = {path.name: path.read_bytes() for path in folder.glob(names)}
                local = {name: data.replace(scratch.encode(), home.encode()) for name, data in local.items()}
                rows = local.pop(ROWS, b"")
                rows = rows[: rows.rfind(b"\n") + 1]
                new = {name: data for name, data in local.items() if data != sent.get(name)}
                if new_rows := rows.removeprefix(sent[ROWS]):
                    new[ROWS] = new_rows
                sent.update(new | {ROWS: rows})
                if new or status:
                    inbox.put.remote(spec.slug, new, [status] if status else []).future().result()

        def stream() -> None:
            while not ended.wait(POLL_S):
                send(names=ROWS)

        runner = Run(Plan(Path(scratch), info), replace(info, jobs=1, notebooks=tuple(statuses)), send)
        threading.Thread(target=stream, daemon=True).start()
        try:
            runner.save()
            kernels.serve(runner.log)
            [run] = runner.runs(replace(info.settings, run_dir=scratch))
            if isinstance(what, Phase):
                runner.pipeline(run, end=what)
            elif all(status.status == "passed" for status in statuses):
                process = kernels.start(runner.log, pipeline.make, run, "samples", what)
                kernels.exit_code(process, info.limits.cell_s + GRACE_S)
                send(names=ROWS)
        finally:
            ended.set()
            kernels.kill(runner.folder)
