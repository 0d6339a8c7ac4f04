//! Running the core: on the crate's own threads, without the GIL, stoppable by Ctrl-C.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use lingrad_core::memory::{make_product_buffers, room};
use lingrad_core::{Context, Error};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::entry::internal_error;
use crate::error::{ArgumentError, LingradError, Result};
use crate::reserve;

/// How often the waiting thread looks for signals and reports progress.
const POLL: Duration = Duration::from_millis(50);

/// Bytes of a thread's stack, as Rust has it by default; and of the pages that it takes beside that.
const STACK: usize = 1 << 21;
const BESIDE_STACK: usize = 1 << 17;

/// What [`make_product_buffers`] takes, in bytes: twice the last cache, as far as the system tells of it, and no less than
/// this.
fn product_buffers() -> usize {
    const LEAST: usize = 1 << 22;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it reads what the system knows.
    let last_cache = unsafe { libc::sysconf(libc::_SC_LEVEL3_CACHE_SIZE) };
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let last_cache = 0;
    usize::try_from(2 * last_cache).unwrap_or(0).max(LEAST)
}

struct Pool {
    /// The process the threads belong to: a fork has none of its parent's.
    process: u32,
    pool: Arc<ThreadPool>,
}

struct Threads {
    requested: Option<usize>,
    pool: Option<Pool>,
}

static THREADS: Mutex<Threads> = Mutex::new(Threads { requested: None, pool: None });

/// The `Python` token is proof that the GIL is held. Nothing lets go of it while the lock is held, so `os.fork` cannot
/// copy a locked mutex into the child.
fn threads(_py: Python<'_>) -> MutexGuard<'static, Threads> {
    THREADS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the machine has for this process, asked once: the system takes longer to say so than a small call.
static MACHINE: OnceLock<usize> = OnceLock::new();

fn default_threads() -> usize {
    std::env::var("RAYON_NUM_THREADS")
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|n| (1..=rayon::max_num_threads()).contains(n))
        .unwrap_or_else(|| *MACHINE.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from)))
}

/// The number of threads of the next call.
pub fn num_threads(py: Python<'_>) -> usize {
    threads(py).requested.unwrap_or_else(default_threads)
}

/// Sets the number of threads of the next call; calls under way keep theirs.
pub fn set_num_threads(py: Python<'_>, n: usize) -> Result<()> {
    let most = rayon::max_num_threads();
    if n == 0 || n > most {
        return Err(ArgumentError::new_err(format!("n is {n}; expected 1 <= n <= {most}")).into());
    }
    threads(py).requested = Some(n);
    Ok(())
}

fn pool(py: Python<'_>) -> Result<Arc<ThreadPool>> {
    let mut threads = threads(py);
    let n = threads.requested.unwrap_or_else(default_threads);
    let process = process::id();
    match &threads.pool {
        Some(p) if p.process == process && p.pool.current_num_threads() == n => return Ok(p.pool.clone()),
        _ => {}
    }
    // A thread that finds no room for its stack is an error, but one that finds none for what it takes beside that ends the
    // process: so all of it is asked for first. What was free then is free again below.
    let stacks = n.saturating_mul(STACK + BESIDE_STACK);
    drop(room::<u8>(stacks, "the stacks of threads (set_num_threads for fewer)")?);
    let pool = ThreadPoolBuilder::new()
        .num_threads(n)
        .stack_size(STACK)
        .thread_name(|i| format!("lingrad-{i}"))
        .build()
        .map_err(|e| LingradError::new_err(format!("cannot start {n} threads: {e}; use set_num_threads")))?;
    // Where there is no memory for them, each thread makes its own with its first large product, as far as the reserve goes.
    if room::<u8>(n.saturating_mul(product_buffers()), "buffers of products").is_ok() {
        pool.broadcast(|_| make_product_buffers());
    }
    let pool = Arc::new(pool);
    let old = threads.pool.replace(Pool { process, pool: pool.clone() });
    if let Some(old) = old
        && old.process != process
    {
        // Its threads are the parent's, and so may be whoever held its locks: leave it alone.
        std::mem::forget(old);
    }
    Ok(pool)
}

/// Runs `work` on the crate's threads while this one waits, without the GIL.
///
/// Every 50 ms the waiting thread takes the GIL to look for signals and to call `progress` with the fraction done. An
/// exception from either (`KeyboardInterrupt`, say) cancels the work, waits until the threads have stopped, and is then
/// raised. A panic becomes a `LingradError`.
pub fn run<R: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(&Context) -> lingrad_core::Result<R> + Send,
) -> Result<R> {
    if let Some(bytes) = reserve::lay() {
        return Err(Error::Memory { what: "the reserve that a call keeps for its errors", bytes }.into());
    }
    let pool = pool(py)?;
    let progress = progress.map(|p| p.clone().unbind());
    let (outcome, interrupt) = py.detach(|| {
        let context = Context::new();
        let context = &context;
        let (sender, receiver) = mpsc::sync_channel(1);
        pool.in_place_scope(|scope| {
            scope.spawn(move |_| {
                // The receiver outlives the scope, so that sending cannot fail.
                let _ = sender.send(catch_unwind(AssertUnwindSafe(|| work(context))));
            });
            let mut interrupt = None;
            loop {
                match receiver.recv_timeout(POLL) {
                    Ok(outcome) => return (Some(outcome), interrupt),
                    Err(RecvTimeoutError::Disconnected) => return (None, interrupt),
                    Err(RecvTimeoutError::Timeout) if interrupt.is_some() => {}
                    Err(RecvTimeoutError::Timeout) => {
                        // None: the interpreter is shutting down, and nobody is left to hear of anything.
                        if let Some(Err(error)) = Python::try_attach(|py| watch(py, context, progress.as_ref())) {
                            context.cancel();
                            interrupt = Some(error);
                        }
                    }
                }
            }
        })
    });
    // Whoever called makes Python's objects of the results.
    reserve::make_room();
    match (interrupt, outcome) {
        (Some(error), _) => Err(error.into()),
        (None, Some(Ok(result))) => {
            py.check_signals()?;
            if let Some(progress) = progress {
                progress.call1(py, (1.0,))?;
            }
            Ok(result?)
        }
        (None, Some(Err(panic))) => Err(internal_error(&*panic).into()),
        (None, None) => Err(internal_error(&"a thread stopped without an answer").into()),
    }
}

fn watch(py: Python<'_>, context: &Context, progress: Option<&Py<PyAny>>) -> PyResult<()> {
    py.check_signals()?;
    match progress {
        Some(progress) => progress.call1(py, (context.progress(),)).map(drop),
        None => Ok(()),
    }
}
