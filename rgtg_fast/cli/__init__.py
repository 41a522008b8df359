"""What the command line is made of: the embedded model, the demo, explanations, batch jobs, reports."""
