"""What compression costs where gradients are on a GPU.

    python -m benchmarks.gpu --device cuda --json build/gpu.json

One process, without Horovod. The same passes in two ways, torch's operations and fused kernels,
beside the usual methods. With ``--device cpu`` everything runs, and its times say nothing of a GPU.
A real training on two ranks that share one GPU is ``benchmarks.gpu.two_ranks``.

Modules:
    passes: The package's passes on a device, in their two ways.
    clock: Times of the device and of the host.
    noise: Gradients and accumulators, drawn on the device.
    methods: Ways to find the largest entries.
    finding: How long these take.
    settling: How long adding up what all ranks sent takes.
    model: A model that consists of gradients only, and its session, alone in a process.
    stepping: A whole step, beside copying all gradients to the host and back.
    launches: How many launches a step takes, also without a GPU.
    waits: Where the host waits for the device in a step.
    memory: Memory of the device in a step.
    two_ranks: A training on two ranks.
    tables: All figures as tables.
    report: A section of a page from files of figures.
    about: The machine.
"""
