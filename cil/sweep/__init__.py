"""Many settings of one benchmark: :mod:`~cil.sweep.grid` says which, :mod:`~cil.sweep.pool` runs them on Ray,
:mod:`~cil.sweep.tune` chooses among them on the first task."""
