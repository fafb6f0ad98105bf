"""What the driver calls for the coherent phase of networks of tiles."""

import calling  # noqa: F401  # puts the drivers on the path
from coherent_cases import CASES, CLASSES, coherent, images, in_tiles
from mpi4py import MPI
from tiled.coherent import TiledTestSet, coherent_loss, eliminated, prepared

from ddml.data.tiled import TiledSamples


def test_the_coarse_net_is_eliminated_from_where_a_local_phase_has_ended(comm: MPI.Comm, prefix: str) -> None:
    module, samples = coherent(**CASES["2x2, linear, logits"]), images(CASES["2x2, linear, logits"]["shape"], 30)
    theta = coherent(**CASES["2x2, linear, logits"]).state_dict()
    loss = coherent_loss(prepared(module), CLASSES, samples.targets, lambda i: in_tiles(module, samples).tiles[i], comm)
    made = eliminated(loss, comm, prefix, steps=15)
    test = TiledTestSet(made.objective, TiledSamples(loss.samples.tiles, samples.targets))
    start = test(loss.initial())
    made.tao.setMaximumIterations(6)
    made.tao.solve()
    found = test(made.layout.gather(made.x).clone())
    assert found["test_loss"] < 0.7 * start["test_loss"]
    assert found["accuracy"] >= start["accuracy"]
    assert all((value == module.state_dict()[name]).all() for name, value in theta.items())  # until assigned
    made.destroy()
