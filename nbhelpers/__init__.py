"""A laboratory for judging local language models: a folder per notebook, from the ground up.

    redact, errors, exercises, records, store, options, registry, tasks, phases
                               secrets; mistakes; the nouns; files; what a name means; what is asked, and when
    stats        (05)          estimates of one model, tests of two (Holm), early looks, ratings, agreement
    devices      (01)          this machine: its device and dtype, what fits, meters
    loading      (02)          the Hub, folders, models, tokenizers, what a server has
    generation   (03)          sampling and its seeds, the decode loop, samples, latency, likelihoods, servers
    scoring      (04)          texts, coherence, rubrics, costs, a judge
    tracking     (06)          metrics and their names, result.json, MLflow
    pipeline                   makes what is missing of a model's files
    comparison   (07, 08)      models side by side, plots, readers' ratings
    logs                       anyone's results, and the gate
    report                     the HTML pages
    runner                     a run: plan, kernels, notebooks, their time limits, progress
    cli_logs, cli              the command line

A file imports only from files above it in this list, or from its own folder.
"""

__version__ = "0.1.0"
