"""A laboratory for judging local language models: a folder per notebook, from the ground up.

    records, store, registry   the nouns; files; what a name means
    stats        (05)          estimates of one model, comparisons of two, early looks, corrections by ratings
    devices      (01)          this machine: device, what fits and how fast, meters
    loading      (02)          the Hub, folders, models, tokenizers, what a server has
    generation   (03)          sampling, the decode loop, samples, latency, likelihoods, servers
    scoring      (04)          texts, coherence, rubrics, costs, a judge
    tracking     (06)          result.json, MLflow
    pipeline                   makes what is missing of a model's files
    comparison   (07, 08)      models side by side, plots, readers' ratings, anyone's logs, the gate
    report                     the HTML pages
    runner                     a run: plan, kernels, notebooks, progress
    cli_logs, cli              the command line

A file imports only from files above it in this list, or from its own folder.
"""

__version__ = "0.1.0"
