from nemo_minitron.evaluation.plots import shown_up_to

NEAR = [0.05, 0.1, 0.02, 0.08, -0.01, 0.04]


def test_an_axis_ends_before_the_layers_that_a_model_cannot_do_without():
    assert shown_up_to([3.6, *NEAR, 1.8]) == 1.25 * 0.1


def test_an_axis_without_outliers_ends_where_it_likes():
    assert shown_up_to(NEAR) is None
    assert shown_up_to([]) is None
    assert shown_up_to([-0.1, -0.2]) is None  # a model that is better without any of its layers
