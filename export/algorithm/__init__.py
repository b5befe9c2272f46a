"""The paper: budget, selection and merging, and the slow oracle they are checked with."""
