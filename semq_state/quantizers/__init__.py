"""Parts of quantisers, for weights and for states: grids, rounding, escapes, branches. Tensors in, tensors out.

A method is a composition: prepare (`smoothing`, `spectrum`), fit a grid (`grid`, `neuqi`), round to it, nearest or
with compensation from a Hessian (`hessian`, `rounding`), and keep a few values exactly (`escapes`).
"""
