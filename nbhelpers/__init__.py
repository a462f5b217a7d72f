"""A laboratory for judging local language models.

The house, from the ground up; a module imports only from those named before it. A room per notebook:
its first idea stands in the module that the notebook is named after.

Ground floor
    records     the nouns: every file's fields and units
    store       files: JSON, rows, locks
    limits      how long things may take, how much may fail
    failures    kinds of failure, and when to give up
    texts       what can be counted in a text
    formats     figures as people read them
    forked      processes forked from a warm server
    processes   processes that are started and stopped together

01 What is this machine, and which models are there?
    checkpoints saved models on disk, checked before anything is loaded
    registry    what a model's or a prompt file's name means
    devices     device, memory, dtypes, what fits
    memory      what training or generating would take
    roofline    how fast this machine could decode at most

02 Loading
    hub         models of the Hugging Face Hub
    downloads   a download in a process of its own
    shapes      real architectures with random weights
    loading     fetch, load, unload
    chat        chat templates, limited
    meters      memory of a stretch of work, leaks
    pool        several models under one memory limit

03 Generation
    sampling    which token comes next
    caches      the key-value cache
    decoding    the decode loop
    energy      counters of processors and cards
    inputs      prompts to token ids, batch size
    noise       what disturbed a measurement
    generation  prompts in, samples out

05 Statistics
    estimates   means, proportions, percentiles with intervals
    clusters    repeats of one prompt
    paired_tests two and more models on the same prompts
    stats       all of it in one place, with verdicts

04 Scoring and cost
    rubrics     the published rubrics
    planted     answers of known standing
    dtypes      the fastest number format that keeps the perplexity (on the planted texts)
    scoring     this laboratory's rubric
    prices      assumed figures and API prices
    costs       what a text costs
    validity    what a rubric is worth
    judge       a model as judge
    same_model  A/A: a model against itself

06, 07, 08 Tracking, comparison, routing
    comparison  all models of a run side by side
    routing     which model should write what
    plots       figures
    summary     one model's result.json
    tracking    MLflow

Top floor
    labels      ratings by people
    quiz        the question bank in the terminal
    report      the HTML report
    forkserver  the warm server
    provisioner kernels from it
    execute     one notebook, executed and checked
    worker      one model's notebooks
    batch       a run
    progress    live progress
    bench       the engine beside its peers
    cli         the command line
"""

__version__ = "0.1.0"
