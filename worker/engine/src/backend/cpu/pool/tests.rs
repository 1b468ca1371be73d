//! Regions: every item once, panics, two engines, sleeping helpers.

use super::*;

#[test]
fn every_item_runs_exactly_once() {
    for threads in [1, 2, 5] {
        let pool = Pool::new(threads, &[]).unwrap();
        for items in [0, 1, 2, 3, 100, 1000] {
            let runs: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            pool.run(items, &|item, thread| {
                assert!(thread < threads);
                runs[item].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1),
                "{threads} threads, {items} items"
            );
        }
    }
}

#[test]
fn many_short_regions_of_two_engines_do_not_mix() {
    let pool = Pool::new(3, &[]).unwrap();
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..3000 {
                    let sum = AtomicUsize::new(0);
                    pool.run(4, &|item, _| {
                        sum.fetch_add(item + 1, Ordering::Relaxed);
                    });
                    total.fetch_add(sum.into_inner(), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 2 * 3000 * 10);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(2, &[]).unwrap();
    for bad in 0..8 {
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|item, _| assert!(item != bad, "item {item} fails"));
        }));
        let message = *result.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, format!("item {bad} fails"));
    }
    let done = AtomicUsize::new(0);
    pool.run(8, &|_, _| {
        done.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(done.into_inner(), 8);
}

#[test]
fn subnormals_are_zero_inside_and_not_outside() {
    let pool = Pool::new(2, &[]).unwrap();
    let tiny = std::hint::black_box(1e-39f32);
    pool.run(64, &|_, _| {
        #[cfg(target_arch = "x86_64")]
        assert_eq!(std::hint::black_box(tiny) * std::hint::black_box(0.5), 0.0);
    });
    assert!(std::hint::black_box(tiny) * std::hint::black_box(0.5) > 0.0);
}

#[test]
fn a_parked_helper_comes_back() {
    let pool = Pool::new(2, &[]).unwrap();
    let began = Instant::now();
    while !pool.shared.parked[0].load(Ordering::SeqCst) {
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "the helper never parked"
        );
        std::thread::yield_now();
    }
    // Two items that wait for each other need two threads.
    let met = std::sync::Barrier::new(2);
    pool.run(2, &|_, _| {
        met.wait();
    });
}
