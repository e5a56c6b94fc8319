"""A small model that is trained from scratch on one-hop problems and tested on compositions.

The learning experiment of the reproduction, at the scale of minutes on a CPU:

- `templates`: word-problem templates made by a grammar, in two groups that share no sentence;
- `problems`: problems and linked pairs drawn from them, some of them held out for testing;
- `examples`: what the model reads and writes, and the mixtures it is trained on;
- `training`: the training loop;
- `measuring`: S1, S2, S_comp and their controls on held-out pairs;
- `experiment`: the job that trains one arm and measures it as it learns;
- `runs` and `exhibits`: the results of several jobs, their curves and tables;
- `findings`: claims with their decision rules, and what the results say about them.
"""
