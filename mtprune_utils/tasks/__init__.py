"""Tasks, one file each: a function of the file's name makes a `core.task.Task`.

A data set says which of them it has.
"""
