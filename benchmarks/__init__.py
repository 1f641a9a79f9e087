"""Benchmarks of hvd_dls. Each is a module, run from the root of the repository.

    python -m benchmarks.exchange --help

Commands:
    selection: Time of finding the largest entries of a layer, on one core.
    wire: Bytes and time that an entry costs on the wire.
    exchange: Time that compression adds to a step where the network is no bottleneck.
    network: Time of a step over slow links, for dense, fp16, layer-wise top-k and DLS.
    memory: Memory of a training step, dense and compressed.
    gpu: Times, waits and memory where gradients are on a GPU.
    synthetic: Horovod's synthetic benchmark, with compression.
    cost_model: A formula for the time of a step, fitted to measurements, and what it predicts.
    convergence: Accuracy of sparse training beside dense training, on small models.
    timeline: A picture of one step from Horovod's timeline.
    hosts: Runs any command on simulated hosts that are joined by slow links.
    results: Runs the benchmarks and rebuilds docs/results.md.

Packages that commands share:
    rounds: Measures several exchange methods in one job, in interleaved rounds.
    common: Shapes of models, synthetic gradients, a stopwatch, tables, the command line.
"""
