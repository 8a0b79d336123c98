"""Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (ICLR 2020), tried out."""
