"""Coverage of candidate intervals at the notebooks' sizes (dev only)."""
import numpy as np
from scipy import stats as st
rng=np.random.default_rng(0)
R=4000
def t_int(x):  # (R,n)
    n=x.shape[1]; m=x.mean(1); h=st.t.ppf(.975,n-1)*x.std(1,ddof=1)/np.sqrt(n); return m-h,m+h
def cover(lo,hi,truth): return float(((lo<=truth)&(truth<=hi)).mean()), float((lo>truth).mean()), float((hi<truth).mean())
print('mean over behaviours, 50 items, t')
for n in (7,12,16):
    for sb in (0,.1,.3,1.0):
        x=1+sb*rng.standard_normal((R,n))+rng.standard_normal((R,n))/np.sqrt(50)
        print(n,sb,cover(*t_int(x),1.0))
    x=np.exp(rng.standard_normal((R,n))); print(n,'lognormal',cover(*t_int(x),np.exp(.5)))
def jack_ratio(a,b):
    n=a.shape[1]; A,B=a.sum(1,keepdims=True),b.sum(1,keepdims=True); th=A/B
    loo=(A-a)/(B-b); ps=n*th-(n-1)*loo; h=st.t.ppf(.975,n-1)*ps.std(1,ddof=1)/np.sqrt(n)
    return th[:,0]-h,th[:,0]+h
def lin_ratio(a,b):
    n=a.shape[1]; th=(a.sum(1)/b.sum(1))[:,None]; e=a-th*b; h=st.t.ppf(.975,n-1)*e.std(1,ddof=1)/np.sqrt(n)/b.mean(1)
    return th[:,0]-h,th[:,0]+h
def fieller(a,b):
    n=a.shape[1]; ma,mb=a.mean(1),b.mean(1); va=a.var(1,ddof=1)/n; vb=b.var(1,ddof=1)/n
    c=((a-ma[:,None])*(b-mb[:,None])).sum(1)/(n-1)/n; t=st.t.ppf(.975,n-1)
    A=mb**2-t*t*vb; B=ma*mb-t*t*c; C=ma**2-t*t*va
    d=np.sqrt(np.maximum(B*B-A*C,0)); lo,hi=(B-d)/A,(B+d)/A
    bad=A<=0; lo[bad]=-np.inf; hi[bad]=np.inf
    return lo,hi
print('ratio of sums: sizes lognormal(.6), between-behaviour sd of the ratio, item noise')
for n in (7,12,16):
    for sr in (.1,.2,.35):
        size=np.exp(.6*rng.standard_normal((R,n)))*2
        r=.8+sr*rng.standard_normal((R,n))
        b=size+rng.standard_normal((R,n))*.3; a=r*size+rng.standard_normal((R,n))*.3
        for name,f in (('jack',jack_ratio),('lin',lin_ratio),('fieller',fieller)):
            lo,hi=f(a,b); print(n,sr,name,cover(lo,hi,.8),'median width',round(float(np.median(hi-lo)),2))
print('crossed with seeds: mean over behaviours and S seeds; seed sd ss, interaction .05')
def satter(y):  # (R,S,n)
    R_,S,n=y.shape; u=y.mean(1); vu=u.var(1,ddof=1)/n; s=y.mean(2); vs=s.var(1,ddof=1)/S
    # interaction is in both: subtract? no
    v=vu+vs; df=v**2/(vu**2/(n-1)+vs**2/(S-1)+1e-300); h=st.t.ppf(.975,df)*np.sqrt(v); m=y.mean((1,2)); return m-h,m+h,h
for S in (2,3,5):
    for n in (7,12):
        for sb,ss in ((.1,.0),(.1,.02),(.1,.05),(.1,.1),(.02,.1)):
            y=1+sb*rng.standard_normal((R,1,n))+ss*rng.standard_normal((R,S,1))+.05*rng.standard_normal((R,S,n))
            lo,hi,h=satter(y); print(S,n,sb,ss,cover(lo,hi,1.0),'half',round(float(np.median(h)),3))
print('56 conversations in 7 clusters, icc; t over cluster means')
for icc in (.1,.3,.5):
    x=np.sqrt(icc)*rng.standard_normal((R,7,1))+np.sqrt(1-icc)*rng.standard_normal((R,7,8)); print(icc,cover(*t_int(x.mean(2)),0.0))
print('share of .02 over 56: t, wilson, clopper, jeffreys')
for p in (.02,.1,.3):
    k=rng.binomial(56,p,R)
    for m in ('wilson','exact'):
        ci=[st.binomtest(int(i),56).proportion_ci(method=m) for i in k]; print(p,m,cover(np.array([c.low for c in ci]),np.array([c.high for c in ci]),p))
print('correlation over 14 points / 7 behaviours: fisher z; jackknife')
