"""Estimators of the influence of a training corpus on a test set, and how well they agree with leave-one-out truth.

Every score is oriented so that larger = more helpful: the test loss would rise if the corpus were left out.
:mod:`gradient`, :mod:`hessian`, :mod:`lissa` and :mod:`arnoldi` need a model and write vectors to files;
:mod:`scores` and :mod:`agreement` read files and numbers and need numpy only.
"""
