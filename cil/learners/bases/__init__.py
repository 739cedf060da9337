"""Base classes and functions that several learners share; each file names the methods that use it."""
