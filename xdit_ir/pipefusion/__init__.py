"""PipeFusion as a program: patches, stages, and what each rank does in a step."""
