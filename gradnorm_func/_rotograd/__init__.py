"""RotoGrad: one rotation of the representation per task."""
