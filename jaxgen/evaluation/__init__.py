"""Evaluation of a bound model: a family's functions with the weights that they are applied to.

  bound        BoundModel (family, state, frozen, mesh), and a jitted program applied to host arrays of any number
  held_out     the family's own metrics of the test split, anomaly detection, disentanglement
  samples      metrics of samples, or of any images, against a data set, in the features of a network
  prompts      classification by prompts, of runs that read texts
  conditional  whether samples show the attributes that they are conditioned on
  cache        outputs of a network for samples, kept until an evaluation is done
  explore      sheets of latent spaces and of samples' nearest training images
  record       evaluation.json

No module here knows a data set or a family by name: what is known of a source beside its examples, its `data.Spec`,
`data.sample_metrics` and `data.same_test_scenes` say.
"""
