"""Many settings of one benchmark: :mod:`~cil.sweep.grid` lists them, :mod:`~cil.sweep.pool` runs them on Ray, and
:mod:`~cil.selection.tune` selects one of them on the first task."""
