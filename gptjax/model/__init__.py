"""The model as a pure function of a tree of parameters: a layer as data (`block`) and what is around the layers
(`gpt`), attention and its kernels, what decoding keeps (`cache`), loss and log-probabilities, heads beside an encoder,
and exact counts of parameters and FLOPs. It names logical axes and knows no mesh."""
