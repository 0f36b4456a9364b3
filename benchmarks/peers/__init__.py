"""Models of other projects, wrapped so that they can be timed beside this project's."""
