//! Help for calls of some tens of microseconds, in which a sleeping thread would just wake: threads that look for the next
//! task for a while before they sleep.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a helper looks for a task before it sleeps: longer than what lies between two calls of a model that decodes. It
/// gives way to any other thread meanwhile.
const LOOK: Duration = Duration::from_micros(500);
/// Looks between two glances at the clock, and at who else wants to run.
const LOOKS: usize = 64;

/// Something to be done while its owner waits.
type Task<'a> = &'a mut (dyn FnMut() + Send);

struct Job {
    task: *mut (dyn FnMut() + Send),
    panic: Option<Box<dyn std::any::Any + Send>>,
    done: AtomicBool,
}

#[derive(Default)]
struct Desk {
    job: AtomicPtr<Job>,
    sleeps: AtomicBool,
}

struct Helper {
    desk: Arc<Desk>,
    thread: Thread,
}

struct Crew {
    /// A fork has none of its parent's threads.
    process: u32,
    helpers: Vec<Helper>,
}

static CREW: Mutex<Crew> = Mutex::new(Crew { process: 0, helpers: Vec::new() });

/// Runs all tasks, the first one on this thread; what no helper takes, too.
pub fn run(tasks: &mut [Task<'_>]) {
    // Where another call has the helpers, this one does without.
    let crew = if tasks.len() > 1 { CREW.try_lock().ok() } else { None };
    let Some(mut crew) = crew else {
        tasks.iter_mut().for_each(|task| task());
        return;
    };
    crew.grow(tasks.len() - 1);
    let (own, others) = tasks.split_at_mut(1);
    let mut jobs: Vec<Job> = others
        .iter_mut()
        .map(|task| {
            let task: *mut (dyn FnMut() + Send + '_) = *task;
            // SAFETY: the lifetime alone changes, and the job is done before this function returns.
            let task =
                unsafe { std::mem::transmute::<*mut (dyn FnMut() + Send + '_), *mut (dyn FnMut() + Send)>(task) };
            Job { task, panic: None, done: AtomicBool::new(false) }
        })
        .collect();
    let helped = jobs.len().min(crew.helpers.len());
    let at = jobs.as_mut_ptr();
    for (i, helper) in crew.helpers.iter().enumerate().take(helped) {
        // SAFETY: a job of the vector, which neither moves nor goes before the helper has said that it is done.
        helper.give(unsafe { at.add(i) });
    }
    let mut panic = None;
    let mut alone = |task: &mut (dyn FnMut() + Send)| {
        if let Err(caught) = catch_unwind(AssertUnwindSafe(task)) {
            panic = Some(caught);
        }
    };
    own.iter_mut().for_each(|task| alone(*task));
    others.iter_mut().skip(helped).for_each(|task| alone(*task));
    for i in 0..helped {
        // SAFETY: as above; the helper has the rest of the job until then.
        let done = unsafe { &(*at.add(i)).done };
        let mut looks = 0;
        while !done.load(Ordering::Acquire) {
            looks += 1;
            if looks % (LOOKS * LOOKS) == 0 { thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
    drop(crew);
    if let Some(panic) = panic.or_else(|| jobs.into_iter().find_map(|job| job.panic)) {
        resume_unwind(panic);
    }
}

impl Crew {
    /// As many helpers as there are to be, as far as threads can be had.
    fn grow(&mut self, count: usize) {
        if self.process != process::id() {
            self.process = process::id();
            // What stands on the desks of a parent's helpers is the parent's.
            std::mem::forget(std::mem::take(&mut self.helpers));
        }
        while self.helpers.len() < count {
            let desk = Arc::new(Desk::default());
            let own = desk.clone();
            match thread::Builder::new().name("lingrad-crew".into()).spawn(move || own.attend()) {
                Ok(handle) => self.helpers.push(Helper { desk, thread: handle.thread().clone() }),
                Err(_) => return,
            }
        }
    }
}

impl Helper {
    fn give(&self, job: *mut Job) {
        self.desk.job.store(job, Ordering::SeqCst);
        if self.desk.sleeps.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
    }
}

impl Desk {
    /// What a helper does, for good.
    fn attend(&self) {
        let mut since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let job = self.job.swap(null_mut(), Ordering::Acquire);
                if job.is_null() {
                    std::hint::spin_loop();
                    continue;
                }
                // SAFETY: whoever gave the job waits until it is done, and leaves it alone until then.
                unsafe {
                    (*job).panic = catch_unwind(AssertUnwindSafe(|| (*(*job).task)())).err();
                    (*job).done.store(true, Ordering::Release);
                }
                since = Instant::now();
            }
            thread::yield_now();
            if since.elapsed() > LOOK {
                self.sleeps.store(true, Ordering::SeqCst);
                if self.job.load(Ordering::SeqCst).is_null() {
                    thread::park();
                }
                self.sleeps.store(false, Ordering::SeqCst);
                since = Instant::now();
            }
        }
    }
}
