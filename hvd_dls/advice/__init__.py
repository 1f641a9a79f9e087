"""Does compression pay here?  Steps of each candidate in turn, and what follows from their times.

Modules, each importing only those before it:
    candidates: What can be given to Horovod as its compression, the most cautious first.
    link: Latency and bandwidth from timed operations.
    deciding: Times of turns to a prediction, and predictions to a recommendation.
    advice: The result, as text and for JSON.
    plan: What to try, and for how long.
    lab: What a framework provides.
    ranks: What ranks tell each other.
    turns: Operations are timed, candidates take turns.
    trying: All of it.

Nothing is imported here: the head of the command needs ``plan`` alone, also without NumPy. Knows no
framework; ``hvd_dls.torch.advising`` and ``hvd_dls.tensorflow.advising`` provide a lab.
"""
