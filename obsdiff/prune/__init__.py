"""Stage one: masks and compensated weights. Shapes never change here. Callable: see obsdiff.prune.stage.prune."""

from obsdiff.callable import make_callable

make_callable(__name__, "prune")
