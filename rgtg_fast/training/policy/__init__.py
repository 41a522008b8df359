"""Training a policy itself: DPO, SimPO, T-REG and RLOO on the trainers of TRL."""
