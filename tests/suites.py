"""What runs in which suite, on how many ranks; conftest.py asks."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# What runs where -----------------------------------------------------------------------------------------------------
#
#                 one rank              two ranks           three ranks
# make check      ends of make test's   -                   SAMPLE
# make test       no long, no SEVERAL,  ranks, their first  no long, no SERIAL, nor what BY_NAME and ENDS leave out,
#                 TURNS                 cases               TURNS, TURNS_ON_RANKS
# make test-long  all                   all but SERIAL      all but SERIAL
#
# --suite chooses the row (long where DDML_LONG is set), mpiexec the column. Tests marked long are skipped elsewhere.
# Ends are of the many cases of a test the first and the last one. So make check has a case or two of everything that is
# said of one rank, but for LENGTHY and, of programs that are started or called, all but STARTS; of several ranks it has
# SAMPLE. What it leaves out: the other cases, two ranks, the solvers and refusals on three that are not in SAMPLE.

SUITES = ("check", "test", "long")

# What knows nothing of ranks, or starts programs of its own: on one rank only. A folder, a file, or a test of a file.
SERIAL = (
    *("jets", "networks", "data/test_samples.py", "linalg/test_polar.py", "norms/test_modular.py"),
    "kernel_machines/test_gradients.py",
    "losses/test_branched.py",
    *("losses/test_kronecker.py", "losses/test_loss.py", "losses/test_module_factors.py"),
    *("losses/test_module_refusals.py", "losses/test_pde_modules.py", "losses/test_restrictions.py"),
    *("losses/test_recorded.py", "objectives/test_waiting.py", "drivers/test_gpu.py"),
    *("problems/test_references.py", "problems/test_program.py", "runs/test_figures.py", "runs/test_history.py"),
    *("losses/test_decayed.py", "losses/test_formats.py", "runs/test_tile_figures.py"),
    *(f"test_{name}.py" for name in ("environment", "house", "options", "origins", "package", "plugins", "prepare")),
    *("test_blocks.py", "test_prepare_harm.py", "test_prepare_volumes.py", "test_synthetic.py"),
    *("data/test_arrays.py", "data/test_images.py", "data/test_inputs.py", "data/test_parting.py"),
    "data/test_tables.py",
    "runs/test_run_file_damage.py::test_a_kill_at_any_moment_leaves_a_whole_file",  # a writer on one rank
    "runs/test_run_file_damage.py::test_what_another_run_writes_meanwhile_is_read_whole_or_refused",
    *(f"drivers/test_{name}.py" for name in ("all_solvers", "bad_problems", "bench", "classify", "faults", "header")),
    *(f"drivers/test_{name}.py" for name in ("job", "kill", "plot_driver", "readme", "restart", "rivals", "same_bits")),
    "drivers/test_kernel_rivals.py",
    *(
        f"drivers/test_{name}.py"
        for name in ("export", "interrupted_code", "mutations", "opened_tiles", "predict", "slips", "slurm")
    ),
    "problems/test_calling.py",
    # what others claim on several ranks
    "solvers/test_frugal.py::test_runs_are_those_of_a_small_network",
    "solvers/test_self_scaled.py::test_the_factor_holds_curvatures_that_the_matrix_does_not",
    "solvers/test_spqn.py::test_a_subdomain_whose_gradient_is_at_rounding_stays_where_it_is",
    "solvers/test_trust_ends.py::test_a_run_at_rounding_has_converged",
    "solvers/test_trust_region.py::test_monotone_methods_never_increase_the_loss",
    "solvers/test_napts.py::test_combined_corrections_promise_no_less_and_save_the_global_step",
    "solvers/test_kernel_fit.py::test_iterations_are_those_of_the_study",
    "solvers/test_kernel_loss_fit.py::test_outputs_are_those_of_scikit_learn_on_the_kernels_own_features",
    "solvers/test_kernel_loss_fit.py::test_outputs_are_those_of_scikit_learns_multinomial_regression",
    "kernel_machines/test_kernel_losses.py",
    "solvers/test_kernel_exchange.py::test_sweeps_are_those_of_the_study_and_end_at_the_dense_solution",
    "data/test_data.py::test_damage_by_chance_is_noticed_or_is_one_of_numbers",
    "data/test_data.py::test_digits_are_those_of_scikit_learn",
    "problems/test_classification.py::test_cross_entropy_is_that_of_torch_and_has_its_derivatives",
)

# What holds a run against the same run on one rank, with nothing between them: on several ranks only.
SEVERAL = (
    "kernel_machines/test_arrivals.py::test_ranks_have_their_shares_and_everything_has_the_same_bits",
    "losses/test_work.py::test_the_work_of_a_solver_does_not_depend_on_the_number_of_ranks",
    "objectives/test_branched_objective.py::test_solvers_have_the_same_trajectory_on_any_number_of_ranks",
    *(f"solvers/test_{name}.py::test_the_trajectory_is_that_on_one_rank" for name in ("apts", "napts", "trust_region")),
    *(f"solvers/test_{name}.py::test_the_iterates_are_the_same_on_any_number_of_ranks"
      for name in ("astrom", "newton")),
    *(f"solvers/test_{name}.py::test_with_blocks_a_run_has_the_same_bits_on_any_number_of_ranks"
      for name in ("gauss_newton", "self_scaled", "spqn")),
    *(f"solvers/test_{name}.py::test_without_blocks_a_run_is_the_same_to_rounding"
      for name in ("gauss_newton", "self_scaled", "spqn")),
    *(f"solvers/test_{name}.py::test_runs_are_the_same_on_any_number_of_ranks"
      for name in ("classifying", "coherent_runs")),
    "solvers/test_curvature_fraction.py",
    "solvers/test_deep_training.py::test_runs_have_the_same_bits_on_any_number_of_ranks",
    "solvers/test_kernel_exchange.py::test_runs_have_the_same_bits_on_any_ranks",
    "solvers/test_nested_schwarz.py",
    "solvers/test_networks_as_subdomains.py::test_schwarz_methods_have_the_same_bits_on_any_number_of_ranks",
    "solvers/test_torch_optimizer.py::test_losses_are_the_same_on_any_number_of_ranks",
)  # fmt: skip

# On several ranks, of these, only the tests that have "ranks" in their names: those claim something of them.
BY_NAME = (
    *("data/test_libsvm.py", "hierarchy/", "problems/test_logistic.py", "sampling/test_nested.py"),
    *(f"solvers/test_{name}.py" for name in ("adagrad", "astrom", "levels", "mlvr", "multilevel_adagrad", "newton")),
    *("solvers/test_torch_optimizer.py", "solvers/test_torch_refusals.py"),
    *("drivers/test_given_options.py", "drivers/test_logistic_driver.py", "drivers/test_pinn_levels.py"),
    *(f"drivers/test_{name}.py" for name in ("deep_kernel_driver", "kernel_driver", "kernel_loss_driver")),
    *("drivers/test_opened.py", "drivers/test_foreign_files.py"),
    *("drivers/test_volumes.py", "decomposition/test_tiles.py", "drivers/test_coarse.py"),
    *(f"drivers/test_tiles_{name}.py" for name in ("bad_input", "local", "phases", "folds")),
    "solvers/test_networks_as_subdomains.py",
    *("objectives/test_deep.py", "solvers/test_deep_training.py"),
    *("runs/test_restart_options.py", "runs/test_run_file_harm.py", "data/test_data_harm.py", "data/test_sources.py"),
    *("kernel_machines/test_balance.py", "kernel_machines/test_arrivals.py"),
    # whose equality over ranks others claim: of scaled problems test_ranks.py, of local curvature that of
    # test_curvature_fraction.py, of models of the Hessian test_the_trajectory_is_that_on_one_rank
    *(f"drivers/test_scaled.py::test_{name}" for name in ("problems_in_users", "a_long_time", "a_run_that_stalls")),
    "objectives/test_composed_solvers.py::test_local_curvature_may_be_that_of_some_of_the_samples",
    "problems/test_problems.py::test_users_problem_is_solved",
    *(f"solvers/test_trust_models.py::test_{name}" for name in ("hessian_products", "gauss_newton_products")),
    # on ranks by the tests of their drivers, dense solutions too
    *(f"solvers/test_kernel_{name}.py" for name in ("exchange", "factors", "fit", "loss_fit", "monitor")),
    # restarts on ranks: test_classifying.py, test_ranks.py
    *(
        f"solvers/test_{name}.py::test_a_resumed_run_goes_on_to_the_last_bit"
        for name in ("apts", "napts", "self_scaled", "spqn", "trust_region")
    ),
    "solvers/test_apts.py::test_the_loss_never_increases",
    "solvers/test_frugal.py::test_restarts_are_exact",
    "solvers/test_self_scaled.py::test_single_precision_gives_way",
    # what is dense on one rank: trajectories on several are those on one by tests that stay
    *(f"solvers/test_{name}" for name in (
        "adam.py::test_iterates_are_those_of_torch", "apts.py::test_corrections_stay",
        "frugal.py::test_other_methods_do_as_always",
        *(f"gauss_newton.py::test_{name}"
          for name in ("a_resumed_run", "a_run_may_go_on", "schwarz_is_its_dense", "steps_are_those")),
        "napts.py::test_without_window_and_coarse", "quasi_newton.py::test_iterates_are_those",
        "schwarz_memory.py::test_kept_matrices", "self_scaled.py::test_iterates", "spqn.py::test_exact_local_solves",
        "trust_models.py::test_secant_models_in_the_kfac", "trust_region.py::test_first_order_iterates",
    )),
    "problems/test_scales.py::test_more_scales",
    # what each rank does alone
    "losses/test_modules.py::test_derivatives_are_those_by_hand",
    "solvers/test_napts.py::test_the_coarse_problem",
)  # fmt: skip

# On three ranks, of the many cases of these tests, the first and the last one: whole runs of the same solvers and
# settings have the bits of one rank there, also through a restart, by tests that stay (test_classifying.py,
# test_the_trajectory_is_that_on_one_rank,
# test_with_blocks_a_run_has_the_same_bits_on_any_number_of_ranks, test_a_run_file_goes_on_on_another_number_of_ranks),
# and so what one rank computes is what is compared on one.
ENDS = (
    *(f"solvers/test_gauss_newton.py::test_{name}"
      for name in ("a_resumed_run_goes_on", "a_run_may_go_on_with_another", "without_blocks_a_run_is_the_same")),
    *(f"solvers/test_apts.py::test_{name}"
      for name in ("the_promise_is_the_true_decrease", "corrections_stay_in_the_trust")),
    "solvers/test_gauss_newton.py::test_steps_are_those_of_dense_least_squares",
    *(f"solvers/test_spqn.py::test_{name}"
      for name in ("an_iteration_takes_the_documented", "exact_local_solves_make", "variants_decrease_the_loss",
                   "without_local_steps_the_method")),
    *(f"solvers/test_adam.py::test_{name}" for name in ("iterates_are_those_of_torch", "a_restart_between_batches")),
    "solvers/test_apts.py::test_one_subdomain_is_the_trust_region_method",
    "runs/test_restart_options.py::test_the_run_file_alone_goes_on_to_the_last_bit",
    "solvers/test_gauss_newton.py::test_schwarz_is_its_dense_formula",
    "solvers/test_lifetime.py::test_states_keep_their_keys",
    "solvers/test_quasi_newton.py::test_iterates_are_those_of_a_dense_implementation",
    "solvers/test_secant.py::test_product_is_that_of_the_dense_recursion",
    *(f"solvers/test_subproblem.py::test_{name}" for name in ("random_matrices", "the_hard_case")),
    "solvers/test_trust_radius.py::test_trials_that_are_not_finite_shrink_the_radius",
    "objectives/test_composed.py::test_residuals_are_those_of_the_composition",
    "losses/test_modules.py::test_training_moves_what_is_trained_only",
    "solvers/test_minimisation.py::test_a_module_is_trained",
    "drivers/test_interruptions.py::test_a_run_goes_on_to_a_checkpoint_that_can_be_written",
    *("kernel_machines/", "solvers/test_deep_training.py", "objectives/test_deep.py"),  # whole: test_kernel_driver.py
    *(f"solvers/test_kernel_{name}.py" for name in ("exchange", "factors", "fit", "loss_fit", "monitor")),
    # the same methods train other networks in test_levels.py, and other tiles
    "drivers/test_pinn_levels.py::test_runs_go_on_to_the_last_bit_on_any_number_of_ranks",
    "drivers/test_tiles_local.py::test_networks_are_the_same_on_any_number_of_ranks",
    *(f"solvers/test_networks_as_subdomains.py::test_{name}"
      for name in ("without_local_steps_and_with_one_subdomain", "the_coarse_phase_never_increases")),
    "solvers/test_curvature_fraction.py",
    "solvers/test_napts.py::test_without_window_and_coarse_directions_it_is_apts",
    # what is the same in test_ranks.py, and in test_bad_input.py
    "drivers/test_field_problems.py::test_a_slip_with_a_meaning_is_solved",
    "runs/test_restart_options.py::test_what_cannot_change_is_refused_on_all_ranks",
)  # fmt: skip

# Of the cases of these tests every second one, or third: the places of a case's values in their lists have a sum that
# the number divides. So each value of a parameter has its turns, and of three parameters and more each pair of values.
TURNS = {
    **dict.fromkeys(
        (
            "data/test_sources.py::test_a_tile_costs_its_share", "data/test_sources.py::test_what_is_outside_of_a_tile",
            "test_blocks.py::test_parts_are_slices",
            "test_prepare.py::test_idx_files", "test_prepare_volumes.py::test_arrays_of_volumes",
            *(f"hierarchy/test_depth.py::test_{name}" for name in ("all_has_the_same_bits", "transfers_are_dense")),
            *(f"jets/test_jets.py::test_{name}" for name in ("jets_and_gradients", "going_on_from")),
            "jets/test_passes.py::test_a_forward_pass_serves",
            "kernel_machines/test_arrivals.py::test_sets_have_the_nearest",
            *(f"kernel_machines/test_{name}" for name in (
                "balance.py::test_boxes_of_public_sets", "halves.py::test_any_number",
                "kernel_operator.py::test_products_are_those", "pivots.py::test_factors",
            )),
            "losses/test_branched.py::test_behind_kept_outputs",
            *(f"losses/test_loss.py::test_{name}" for name in ("a_restricted_loss_is", "parts_sum")),
            "losses/test_restrictions.py::test_a_restriction_of_a_restriction",
            "networks/test_classifiers.py::test_outputs_and_seeds",
            "objectives/test_branched_objective.py::test_on_any_number_of_ranks_it_is",
            "objectives/test_deep.py::test_the_gradient_is_that_through",
            *(f"objectives/test_{name}" for name in (
                "objective.py::test_values_and_derivatives", "objective.py::test_a_sampled_objective",
                "waiting.py::test_an_evaluation_waits", "waiting.py::test_products_with_a_jacobian",
            )),
            "problems/test_calling.py::test_functions_give_tensors",
            "solvers/test_apts.py::test_a_resumed_run", "solvers/test_frugal.py::test_runs_are_those",
            *(f"solvers/test_gauss_newton.py::test_{name}" for name in ("steps_are_those", "schwarz_is_its_dense")),
            *(f"solvers/test_kernel_{name}" for name in (
                "factors.py::test_factors_in_float32", "fit.py::test_the_preconditioner_is",
                "loss_fit.py::test_a_run_goes_on", "loss_fit.py::test_separable_classes",
            )),
            "solvers/test_levels.py::test_two_grids", "solvers/test_line_search.py::test_accepted_steps",
            "solvers/test_quasi_newton.py::test_iterates_are_those", "solvers/test_secant.py::test_product_is_that",
            *(f"solvers/test_spqn.py::test_{name}" for name in ("a_subdomain_whose_gradient", "exact_local_solves")),
            "solvers/test_subproblem.py::test_the_hard_case", "solvers/test_torch_optimizer.py::test_steps_and_states",
            "solvers/test_torch_refusals.py::test_what_goes_wrong_in_one_closure",
            *(f"solvers/test_trust_region.py::test_{name}" for name in ("a_resumed_run", "monotone_methods")),
            "drivers/test_volumes.py::test_runs_have_the_same_bits",
        ),
        2,
    ),
    "solvers/test_agreement.py::test_errors_of_one_group": 3,
}  # fmt: skip

# Likewise on three ranks, of solvers with many settings, and on one rank, where they run there, the other cases. Whole
# runs of all solvers on three ranks: test_classifying.py.
TURNS_ON_RANKS = {
    "drivers/test_kernel_driver.py::test_the_machine_is_that": 2,
    "drivers/test_kernel_loss_driver.py::test_the_gradient": 2,
    "losses/test_work.py::test_the_work_of_a_solver": 3,
    "problems/test_collocation.py::test_every_solver": 2,
    "solvers/test_apts.py::test_the_trajectory": 2,
    "solvers/test_levels.py::test_runs_are_the_same": 3,
    "solvers/test_spqn.py::test_with_blocks": 2,
    "solvers/test_trust_region.py::test_a_run_file_goes_on": 2,
}

# make check: a solver of each family on three ranks, and through a restart
_RUNS = "solvers/test_classifying.py::test_runs_are_the_same_on_any_number_of_ranks_and_restart_exactly"
SAMPLE = (
    *(f"{_RUNS}[{name}-digits]" for name in ("lbfgs", "ssbroyden", "tr", "aspqn", "mspqn_dense", "apts_weights")),
    *(f"{_RUNS}[{name}-digits]" for name in ("apts_data", "napts", "tr, K-FAC norm, L-BFGS")),
    "solvers/test_gauss_newton.py::test_with_blocks_a_run_has_the_same_bits_on_any_number_of_ranks",
    "runs/test_run_file.py",
    *(f"drivers/test_bad_input.py::test_bad_input_is_named_in_one_line_on_all_ranks[{name}"
      for name in ("unknown", "residual", "restart", "output")),
)  # fmt: skip

# make check: six starts of drivers
STARTS = (
    "drivers/test_bad_input.py::test_a_driver_that_refuses_prints_one_line_and_ends_with_1[unknown option of a local",
    "drivers/test_classify.py::test_digits_are_learnt",
    "drivers/test_classify_bad_input.py::test_help_lists_the_options",
    "drivers/test_faults.py::test_trials_that_are_not_finite_are_rejected",
    "drivers/test_faults.py::test_exception_on_one_rank_ends_all",
    "drivers/test_plot_driver.py::test_convergence_and_maps",
)

# long enough to be left out of make check: each takes two seconds and more, together a minute
LENGTHY = (
    *("problems/test_references.py", "runs/test_run_file_damage.py", "objectives/test_composed_solvers.py"),
    "data/test_data.py::test_damage_by_chance",
    "kernel_machines/test_arrivals.py::test_ranks_that_are_slow",
    *(f"solvers/test_{name}" for name in (
        "kernel_exchange.py::test_sweeps_are", "kernel_fit.py::test_iterations_are",
        "kernel_loss_fit.py::test_subdomains_save", "mlvr.py::test_it_comes", "registry.py::test_nothing_is_loaded",
        "self_scaled.py::test_where_rounding", "trust_models.py::test_hessian_products",
        "trust_region.py::test_near_directions",
    )),
    "test_prepare.py::test_an_interruption",
)  # fmt: skip


def chosen(items: Iterable[pytest.Item], suite: str, size: int) -> list[pytest.Item]:
    """Those tests that a suite runs on so many ranks."""
    found = [item for item in items if _runs(item, suite, size)]
    if suite == "long":
        return found
    tests: dict[str, list[pytest.Item]] = {}
    for item in found:
        if not item.get_closest_marker("long"):
            tests.setdefault(_name(item).partition("[")[0], []).append(item)
    ends = () if (size == 1) == (suite == "test") else ENDS if size > 2 else ""  # "" of all
    left_out = set()
    for name, cases in tests.items():
        for number, divided in _turns(name, suite, size):
            places = zip(cases, _places(cases), strict=True)
            left_out.update(case for case, place in places if (place % number == 0) != divided)
        if name.startswith(ends):
            left_out.update([case for case in cases if case not in left_out][1 : None if size == 2 else -1])
    return [item for item in found if item not in left_out]


def _turns(name: str, suite: str, size: int) -> Iterator[tuple[int, bool]]:
    """The numbers that divide the places of a test's cases, or do not."""
    if suite == "test":
        yield from ((number, True) for start, number in TURNS.items() if name.startswith(start))
        yield from ((number, size > 1) for start, number in TURNS_ON_RANKS.items() if name.startswith(start))


def _places(cases: Iterable[pytest.Item]) -> Iterator[int]:
    """The sum of the places that the values of a case have in their lists."""
    lists: dict[object, dict[object, int]] = {}
    for case in cases:
        place = 0
        for mark in case.iter_markers("parametrize"):
            names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else mark.args[0]
            values = tuple(id(case.callspec.params[name]) for name in names)  # type: ignore[attr-defined]
            known = lists.setdefault(tuple(names), {})
            place += known.setdefault(values, len(known))
        yield place


def _name(item: pytest.Item) -> str:
    return f"{item.path.relative_to(HERE)}::{item.name}"


def _runs(item: pytest.Item, suite: str, size: int) -> bool:
    name = _name(item)
    if size > 1 and name.partition("[")[0] in SERIAL:
        return False
    if size == 1 and suite != "long" and name.startswith(SEVERAL):
        return False
    if suite == "check":
        if size > 1 or name.startswith("drivers"):
            return name.startswith(SAMPLE if size > 1 else STARTS)
        return not name.startswith(LENGTHY)
    if size > 1 and suite == "test" and name.startswith(BY_NAME) and "ranks" not in item.name:
        return False
    return suite == "long" or size != 2 or item.get_closest_marker("ranks") is not None
