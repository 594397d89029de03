"""From one rank's program to code that runs, and where its weights come from."""
